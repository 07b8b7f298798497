"""Save and load the checkpoints of a run.

`checkpoints/step-NNNNNN/` holds the weights, their average, the optimizer's state and `state.json`, as safetensors and
JSON. A checkpoint is written to a temporary folder and renamed, so a checkpoint either exists completely or not at all.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from imagewam_cli.config import dump_json
from imagewam_cli.errors import RunError
from imagewam_cli.files import PARTIAL, atomic_folder
from imagewam_cli.training.optimizer import ExpertOptimizer

_KEEP = 2


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, average: dict[str, Tensor], optimizer: ExpertOptimizer
) -> None:
    """Save a checkpoint after `step` steps, and delete all but the newest two."""
    from safetensors.torch import save_file

    name = f"step-{step:06d}"
    with atomic_folder(folder / name, replace=True, partial=folder / f".{name}{PARTIAL}") as partial:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
        save_file({k: v.contiguous() for k, v in average.items()}, partial / "average.safetensors")
        save_file({k: v.contiguous() for k, v in optimizer.state().items()}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(dump_json({"step": step}))
    for old in _checkpoints(folder)[:-_KEEP]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: nn.Module, average: dict[str, Tensor], optimizer: ExpertOptimizer) -> int:
    """Load the newest checkpoint into the model, average and optimizer. Returns its step, or 0 without a checkpoint.

    Raises:
        RunError: the checkpoint is damaged or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = _checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    try:
        step = int(json.loads((newest / "state.json").read_text())["step"])
        model.load_state_dict(load_file(newest / "model.safetensors"))
        loaded = load_file(newest / "average.safetensors")
        for name in average:
            average[name].copy_(loaded[name])
        optimizer.load(load_file(newest / "optimizer.safetensors"))
    except (RuntimeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise RunError(
            f"{newest} is damaged or does not fit this run: {str(error).splitlines()[-1].strip()}",
            "delete it to resume from the previous checkpoint, or start over with --fresh",
        ) from None
    return step


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

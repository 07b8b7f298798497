"""Save and load the checkpoints of a run.

`checkpoints/step-NNNNNN/` holds the weights, their average, the optimizer's state and `state.json`, as safetensors and
JSON. A checkpoint is written to a temporary folder and renamed, so a checkpoint either exists completely or not at all.
Checksums in `state.json` reveal later damage; a damaged checkpoint is set aside, and the one before it is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from imagewam_cli.config import dump_json
from imagewam_cli.errors import RunError, warn
from imagewam_cli.files import PARTIAL, atomic_folder, checksum_of
from imagewam_cli.training.optimizer import ExpertOptimizer

_KEEP = 2
_MODEL, _AVERAGE, _OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"
_STATE = "state.json"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, average: dict[str, Tensor], optimizer: ExpertOptimizer
) -> None:
    """Save a checkpoint after `step` steps, and delete all but the newest two."""
    from safetensors.torch import save_file

    name = f"step-{step:06d}"
    tensors = {_MODEL: model.state_dict(), _AVERAGE: average, _OPTIMIZER: optimizer.state()}
    with atomic_folder(folder / name, replace=True, partial=folder / f".{name}{PARTIAL}") as partial:
        for file, values in tensors.items():
            save_file({k: v.contiguous() for k, v in values.items()}, partial / file)
        checksums = {file: checksum_of((partial / file).read_bytes()) for file in tensors}
        (partial / _STATE).write_text(dump_json({"step": step, "checksums": checksums}), encoding="utf-8")
    for old in _checkpoints(folder)[:-_KEEP]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: nn.Module, average: dict[str, Tensor], optimizer: ExpertOptimizer) -> int:
    """Load the newest intact checkpoint into the model, average and optimizer. Returns its step, 0 without checkpoints.

    Newer checkpoints that are damaged are warned of and renamed to `step-NNNNNN.damaged`.

    Raises:
        RunError: every checkpoint is damaged or does not fit the model.
    """
    damaged: list[tuple[Path, RunError]] = []
    for path in reversed(_checkpoints(folder)):
        try:
            step = _load(path, model, average, optimizer)
        except RunError as error:
            damaged.append((path, error))
            continue
        for other, problem in damaged:
            aside = other.with_name(f"{other.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            warn(f"{problem.message}; it is renamed to {aside.name}, and training goes on from step {step}")
        return step
    if damaged:
        raise damaged[0][1]
    return 0


def _load(path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: ExpertOptimizer) -> int:
    """Load one checkpoint and return its step.

    Raises:
        RunError: it is damaged or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        step, checksums = int(state["step"]), state.get("checksums", {})
        content = {file: (path / file).read_bytes() for file in (_MODEL, _AVERAGE, _OPTIMIZER)}
        for file, data in content.items():
            if file in checksums and checksum_of(data) != checksums[file]:
                raise ValueError(f"{file} differs from its checksum")
        model.load_state_dict(load(content[_MODEL]))
        loaded = load(content[_AVERAGE])
        for name in average:
            average[name].copy_(loaded[name])
        optimizer.load(load(content[_OPTIMIZER]))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
        raise RunError(
            f"{path} is damaged or does not fit this run: {str(error).splitlines()[-1].strip()}",
            "choose another folder with --out, or start over with --fresh",
        ) from None
    return step


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

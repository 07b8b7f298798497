"""Read a published checkpoint: the tensors of editor, expert and proprio encoder under their published names.

`torch.save` of {"mot": state dict, "step", "torch_dtype", "proprio_encoder"}. Names in `mot`:
`mixtures.video.transformer.*`, `mixtures.action.*`, and the editor's blocks a second time as
`mixtures.video.double_blocks.*` and `mixtures.video.single_blocks.*`, sharing storage. Source: arXiv 2606.19531's
code.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagewam_cli.editors.loading.weight_files import kind_of_file
from imagewam_cli.errors import RunError

_EDITOR, _EXPERT = "mixtures.video.transformer.", "mixtures.action."
_ALIASES = ("mixtures.video.double_blocks.", "mixtures.video.single_blocks.")
_KEYS = {"mot", "dit", "step", "torch_dtype", "proprio_encoder", "optimizer", "checkpoint_format"}
"""Known keys. `dit` is an older name of `mot`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors of a checkpoint, named without their prefixes. proprio: weight (D, S) and bias (D,), or None."""

    editor: Mapping[str, Tensor]
    expert: Mapping[str, Tensor]
    proprio: Mapping[str, Tensor] | None
    bfloat16: bool
    """Whether the policy was trained in bfloat16."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without executing any code in it.

    Raises:
        RunError: the file is missing, contains more than tensors, is not a checkpoint, or has unknown names.
    """
    values = _load(path)
    mot = values.get("mot", values.get("dit"))
    if not isinstance(mot, Mapping):
        raise RunError(
            f"{path} is not an ImageWAM checkpoint: it has no 'mot'", "pass the model.pt of a published policy"
        )
    unknown = sorted(str(key) for key in values.keys() - _KEYS)
    unknown += [name for name in mot if not name.startswith((_EDITOR, _EXPERT, *_ALIASES))]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise RunError(f"{path} has unknown names: {', '.join(unknown[:8])}{more}")
    _require_aliases(path, mot)
    proprio = values.get("proprio_encoder")
    if proprio is not None and set(proprio) != {"weight", "bias"}:
        raise RunError(f"{path}: proprio_encoder has {', '.join(sorted(proprio))} instead of weight and bias")
    for name, value in {**mot, **(proprio or {})}.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not name.startswith(_ALIASES):
            low, high = value.aminmax()
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise RunError(f"{path} is damaged: {name} has NaN or infinite values", "download it again")
    return Checkpoint(
        editor=_under(mot, _EDITOR),
        expert=_under(mot, _EXPERT),
        proprio=proprio,
        bfloat16="bfloat16" in str(values.get("torch_dtype", "")),
    )


def _load(path: Path) -> dict[str, Any]:
    if path.is_file():
        with path.open("rb") as file:
            reason = kind_of_file(file.read(512))
        if reason is not None and "pickle" not in reason:
            raise RunError(f"{path} {reason}", "download the model.pt of a published policy again")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise RunError(f"no such file: {path}", "pass the model.pt of a published policy") from None
    except pickle.UnpicklingError:
        raise RunError(
            f"{path} contains more than tensors and was not loaded, because such a file can run arbitrary code",
            "ask its authors for a checkpoint that contains only tensors",
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise RunError(f"{path} is damaged or not a checkpoint: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} is not an ImageWAM checkpoint: it holds a {type(values).__name__}")
    return values


def _require_aliases(path: Path, mot: Mapping[str, Tensor]) -> None:
    """Check that the second listing of the editor's blocks has the same tensors, so that it can be ignored."""
    for name, value in mot.items():
        if not name.startswith(_ALIASES):
            continue
        other = mot.get(_EDITOR + name.removeprefix("mixtures.video."))
        if other is None:
            raise RunError(f"{path} lists {name} without its {_EDITOR}* counterpart")
        same = other.data_ptr() == value.data_ptr() and other.shape == value.shape
        if not same and not torch.equal(other, value):
            raise RunError(f"{path} lists {name} twice with different values")


def _under(mot: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in mot.items() if name.startswith(prefix)}

"""Read pipeline folders in the diffusers format: check whose they are, and load single components."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagewam_cli.config import dump_json
from imagewam_cli.editors.loading.attention_backend import torch_attention
from imagewam_cli.editors.loading.fit import Fit, quiet, require_fitting
from imagewam_cli.editors.loading.hardware import find_resource_error
from imagewam_cli.editors.loading.single_file import describe_folder, describe_single
from imagewam_cli.editors.loading.weight_files import AGAIN, DIFFUSERS, weight_files
from imagewam_cli.errors import EditorError

_DAMAGED = "config.json and weights must match: fetch the editor again, or pass a different --weights"
_NOWHERE = "no-adapter"
"""Sub-folder that does not exist. transformers looks there for a LoRA, which it would apply if peft is installed."""


class PipelinePart(Protocol):
    """Class of a component of a pipeline: a model, tokenizer, processor or scheduler of diffusers or transformers."""

    @classmethod
    def from_pretrained(cls, folder: Path, /, **options: Any) -> Any: ...


def require_family(folder: Path, family: str, parts: Collection[str]) -> None:
    """Check that a folder belongs to a family. A different family may have the same sub-folders, and would fail only at
    the first row.

    Raises:
        EditorError: the folder belongs to a different pipeline, or a component is missing.
    """
    wanted = f"pass the folder of a diffusers {family}, with {', '.join(f'{part}/' for part in parts)}"
    if folder.is_file():
        raise EditorError(f"{folder} {describe_single(folder)}; single files are not read", wanted)
    if not folder.is_dir():
        raise EditorError(f"{folder} does not exist", wanted)
    found = _family(folder)
    if found not in {None, family}:
        raise EditorError(
            f"{folder} is a {found} folder, not a {family} one",
            "`imagewam editors --format json` lists the family of each editor",
        )
    if found is None and (what := describe_folder(folder, parts)) is not None:
        raise EditorError(f"{folder} is not a {family} folder: it {what}", wanted)
    for name in parts:
        if not (folder / name).is_dir():
            raise EditorError(
                f"{folder} is not a {family} folder: it has no {name}/", f"it needs {', '.join(f'{p}/' for p in parts)}"
            )


def load_part(
    folder: Path,
    name: str,
    kind: type[PipelinePart],
    device: torch.device | str | None,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """Load one component of a pipeline folder in evaluation mode, without gradients.

    kind: a class with `from_pretrained`; for a model its own class, not an `AutoModel`. device: None leaves a model
    on the device that `options`, arguments of its `from_pretrained`, select.

    Raises:
        EditorError: the component does not match its config.
        OSError, torch.OutOfMemoryError: the disk (of offloaded weights) or the device is full.
    """
    from diffusers import ModelMixin

    model_class = issubclass(kind, nn.Module)
    if model_class:
        of_diffusers = issubclass(kind, ModelMixin)
        options |= {"torch_dtype" if of_diffusers else "dtype": dtype, "use_safetensors": True}
        if not of_diffusers:
            options |= {"adapter_kwargs": {"subfolder": _NOWHERE}} | torch_attention(folder / name)
    try:
        with quiet():
            if not model_class:
                return kind.from_pretrained(folder / name)
            model, report = kind.from_pretrained(folder / name, output_loading_info=True, **options)
    except Exception as error:  # for a damaged file, the libraries may raise any exception
        if (full := find_resource_error(error)) is not None:  # not caused by the folder
            raise full from None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(" If you want")[0]
        hint = _DAMAGED if model_class else AGAIN
        raise EditorError(f"{folder / name} cannot be loaded as {kind.__name__}: {reason}", hint) from error
    found = Fit.reported(model, report)
    # quantizers change names and shapes; the stored ones were compared before
    require_fitting(
        folder / name, replace(found, unexpected=(), shapes={}) if "quantization_config" in options else found
    )
    _require_finite(model, folder / name)
    return (model if device is None else model.to(device)).eval().requires_grad_(False)


def _require_finite(model: nn.Module, folder: Path) -> None:
    """Check that no weight is NaN or infinite. Weights that are not in memory, or quantized, are not checked.

    Raises:
        EditorError: one is; the message names the tensor.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        # extrema are one pass without a copy, and NaN if any number is
        if value.dtype.is_floating_point and value.numel() and type(value.data) is Tensor and not value.is_meta:
            low, high = value.detach().aminmax()
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise EditorError(
                    f"the weights in {folder} are damaged: {name!r} has NaN or infinite values",
                    "the file is damaged, or its training diverged: pass other weights",
                )


def part_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read all weights of a component of diffusers, from one file or several.

    Raises:
        EditorError: there is no weight file, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = weight_files(folder / name, DIFFUSERS).files
    try:
        return {key: value for path in files for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise EditorError(f"{folder / name} is damaged: {error}", "fetch the editor again") from None


def write_part(folder: Path, name: str, config: Mapping[str, object], weights: Mapping[str, Tensor]) -> None:
    """Write a component that `load_part` can read."""
    from safetensors.torch import save_file

    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "config.json").write_text(dump_json(config), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / name / "diffusion_pytorch_model.safetensors")


def require_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Check that two state dicts have the same names and shapes.

    Raises:
        EditorError: they differ; the message is `what` and the names that are missing, unknown or of a different shape.
    """
    mismatched = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of a different shape": mismatched,
    }
    problems_text = [f"{kind}: {', '.join(names[:8])}{_and_more(names)}" for kind, names in problems.items() if names]
    if problems_text:
        raise EditorError(f"{what}; {'; '.join(problems_text)}")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 8} more" if len(names) > 8 else ""


def randomize(model: nn.Module, seed: int) -> None:
    """Replace the weights of a model with random ones, as its class initializes them."""
    kind: Any = type(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = kind.from_config(model.config) if hasattr(kind, "from_config") else kind(model.config)
    model.load_state_dict(fresh.state_dict())


def revision(folder: Path) -> str | None:
    """Return the commit if the folder is a snapshot in the Hub's cache, else None."""
    return folder.name if folder.parent.name == "snapshots" else None


def _family(folder: Path) -> str | None:
    """Return the family in model_index.json; None without that file: such a folder is accepted if it has the required
    sub-folders."""
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise EditorError(f"{index} is damaged: {error}", "fetch the editor again") from error
    return str(found)

"""Read pipeline folders in the diffusers format: load single components, and identify a folder by its digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagewam_cli.config import dump_json
from imagewam_cli.editors.loading.attention_backend import torch_attention
from imagewam_cli.editors.loading.hardware import find_resource_error
from imagewam_cli.editors.loading.hub import is_loaded_file
from imagewam_cli.errors import EditorError
from imagewam_cli.files import sha256_of

_DAMAGED = "config.json and weights must match: fetch the editor again, or pass a different --weights"


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
    if not folder.is_dir():
        raise EditorError(f"{folder} does not exist", f"--weights takes the folder of a diffusers {family}")
    found = _family(folder)
    if found not in {None, family}:
        raise EditorError(
            f"{folder} is a {found} folder, not a {family} one",
            "`imagewam editors --format json` lists the family of each editor",
        )
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

    try:
        with _no_bars():
            if not issubclass(kind, nn.Module):
                return kind.from_pretrained(folder / name)
            if not issubclass(kind, ModelMixin):
                options |= torch_attention(folder / name)
            options |= {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype, "use_safetensors": True}
            model, report = kind.from_pretrained(folder / name, output_loading_info=True, **options)
    except Exception as error:  # for a damaged file, the libraries may raise any exception
        if (full := find_resource_error(error)) is not None:  # not caused by the folder
            raise full from None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(" If you want")[0]
        raise EditorError(f"{folder / name} cannot be loaded: {reason}", _DAMAGED) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise EditorError(f"{folder / name} lacks {len(missing)} of its tensors, including {missing[0]!r}", _DAMAGED)
    return (model if device is None else model.to(device)).eval().requires_grad_(False)


def part_config(folder: Path, name: str) -> dict[str, object]:
    """Read config.json of a component.

    Raises:
        EditorError: the file is missing or damaged.
    """
    path = folder / name / "config.json"
    try:
        values: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EditorError(f"{path} is missing or damaged: {error}", "fetch the editor again") from None
    return values


def part_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read all weights of a component, from one file or several.

    Raises:
        EditorError: there is no weight file, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [path for path in sorted((folder / name).glob("*.safetensors")) if is_loaded_file(path.name)]
    if not files:
        raise EditorError(f"{folder / name} has no weights as safetensors", "fetch the editor again")
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


def digest(parts: Mapping[str, Path]) -> str:
    """Return a SHA-256 over names and contents of the weight, config and tokenizer files. Other files and the folder's
    origin do not matter.

    parts: sub-folder -> the pipeline folder that contains it.
    """
    total = hashlib.sha256()
    found = {
        path.relative_to(home).as_posix(): path for part, home in parts.items() for path in (home / part).rglob("*")
    }
    for name, path in sorted(found.items(), key=lambda item: Path(item[0])):
        if not is_loaded_file(path.name):
            continue
        blob = path.resolve().name  # in the Hub's cache a large file is a link to its own sha256
        known = path.is_symlink() and len(blob) == 64
        content = blob if known else sha256_of(path)
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()


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


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide transformers' progress bar: the command that loads has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

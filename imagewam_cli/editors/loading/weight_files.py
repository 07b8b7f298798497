"""The weight files of one component of a pipeline folder: which files its loader reads, and what their headers say.

A header lists the name, shape and type of every tensor. Reading all headers of a model takes milliseconds, so a folder
is checked before any of its weights are read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from imagewam_cli.errors import EditorError

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Names, without suffix, of the weight files that the two libraries write and read."""
AGAIN = "download the component again, with `imagewam fetch` or from where the folder comes from"
FULL_PRECISION = "pass a folder with weights in 16 or 32 bits; imagewam can quantize them itself while they load"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_ADAPTERS = (
    "pytorch_lora_weights*.safetensors",
    "adapter_model*.safetensors",
    "adapter_config.json",
    "*lora*.safetensors",
)
"""File names under which trainers save LoRAs and other adapters."""
_POINTER = b"version https://git-lfs.github.com/spec"
_LARGEST_HEADER = 100_000_000
"""Limit of the safetensors format, in bytes."""
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file. dtype: in the words of safetensors, such as "BF16" or "F8_E4M3"."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that a loader reads, and all their tensors."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    sharded: bool


def is_adapter(name: str) -> bool:
    """Return whether a file of this name belongs to a LoRA or another adapter, which no loader of components reads."""
    return any(fnmatch(name.lower(), pattern) for pattern in _ADAPTERS)


def weight_files(folder: Path, stem: str) -> WeightFiles:
    """Find the files that the loader of a component reads, and read their headers.

    stem: `DIFFUSERS` or `TRANSFORMERS`.

    Raises:
        EditorError: there are none, or a file is missing, damaged or not in the safetensors format.
    """
    paths, named = _loaded_paths(folder, stem)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        tensors |= read_header(path)
    for name, path in named.items():
        if name not in tensors:
            raise EditorError(f"{path} lacks the tensor {name!r}, which the index of {folder} puts there", AGAIN)
    if not tensors:
        raise EditorError(f"{paths[0]} holds no tensors", AGAIN)
    return WeightFiles(folder=folder, files=tuple(paths), tensors=tensors, sharded=bool(named))


def loaded_names(folder: Path, stem: str) -> frozenset[str]:
    """Return the names of the weight files that a loader reads; empty if there are none, or their index is damaged."""
    try:
        paths, named = _loaded_paths(folder, stem)
    except EditorError:
        return frozenset()
    return frozenset({path.relative_to(folder).as_posix() for path in paths}) | (
        {f"{stem}.safetensors.index.json"} if named else frozenset()
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, and check that the file is complete.

    Raises:
        EditorError: the file is missing, damaged, cut off, or of another kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if (reason := kind_of_file(start)) is not None:
                raise EditorError(f"{path} {reason}", _hint_for(start))
            if start[8:9] == b"{" and size - 8 < length <= _LARGEST_HEADER:
                raise EditorError(f"{path} is cut off: it has {size:,} bytes, fewer than its header", AGAIN)
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise EditorError(f"{path} is damaged or not a safetensors file", AGAIN)
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(shape=tuple(map(int, entry["shape"])), dtype=str(entry["dtype"]), file=path)
            for name, entry in header.items()
        }
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        damaged = [name for name, entry in header.items() if not _has_its_size(found[name], entry["data_offsets"])]
    except FileNotFoundError:
        raise EditorError(f"{path} is a link to a file that does not exist", AGAIN) from None
    except OSError as error:
        raise EditorError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", AGAIN) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EditorError(f"{path} has a damaged header: {error}", AGAIN) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = f"is cut off: it has {size:,} of {expected:,} bytes"
        raise EditorError(
            f"{path} {state if size < expected else 'has bytes after its last tensor, so it is damaged'}", AGAIN
        )
    if damaged:
        raise EditorError(f"{path} has a damaged header: {damaged[0]!r} has not the size of its shape", AGAIN)
    return found


def require_content(path: Path) -> None:
    """Check that a small file of a component was downloaded: it is readable, not empty, and no Git LFS pointer.

    Raises:
        EditorError: it is not.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise EditorError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", AGAIN) from None
    if not start or start.startswith(_POINTER):
        raise EditorError(f"{path} {kind_of_file(start)}", _hint_for(start))
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise EditorError(f"{path} is damaged: {error}", AGAIN) from None


def _loaded_paths(folder: Path, stem: str) -> tuple[list[Path], dict[str, Path]]:
    """Return the weight files that a loader reads, and the file of each tensor according to the index.

    diffusers prefers the index to the single file, transformers prefers the single file.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    candidates = (index, single) if stem == DIFFUSERS else (single, index)
    chosen = next((path for path in candidates if path.is_file() or path.is_symlink()), None)
    if chosen == single:
        return [single], {}
    if chosen is None:
        raise _no_weights(folder, stem)
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "is an LFS pointer" if _is_pointer(index) else f"is damaged: {type(error).__name__}: {error}"
        raise EditorError(f"{index} {reason}", AGAIN) from None
    if not named:
        raise EditorError(f"{index} is damaged: it names no tensors", AGAIN)
    files = sorted(set(named.values()))
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise EditorError(f"{index} names {file}, which is outside its folder", AGAIN)
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EditorError(
            f"{folder} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}{more}", AGAIN
        )
    return [folder / file for file in files], {name: folder / file for name, file in named.items()}


def _no_weights(folder: Path, stem: str) -> EditorError:
    """Return the error for a component without the weight files that its loader reads, by what it has instead."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    wanted = f"{stem}.safetensors"
    convert = "convert the weights to safetensors with a tool that you trust, or pass another folder"
    variants = [n for n in names if fnmatch(n, f"{stem}.*.safetensors") or fnmatch(n, f"{stem}*.index.*.json")]
    if variants:
        return EditorError(
            f"{folder} has its weights only as a variant ({variants[0]}), which is not read",
            f"if its precision is good enough, rename it to {wanted}",
        )
    if gguf := [n for n in names if n.lower().endswith(".gguf")]:
        return EditorError(f"{folder} has its weights only as GGUF ({gguf[0]}), which is not read", FULL_PRECISION)
    pickled = [n for n in names if any(fnmatch(n, pattern) for pattern in _PICKLES)]
    other = [n for n in names if n.endswith(".safetensors")]
    if any(n.startswith(f"{stem}-0") for n in other):
        return EditorError(f"{folder} has parts of its weights but not {wanted}.index.json, which lists them", AGAIN)
    if other and not all(map(is_adapter, other)):
        return EditorError(
            f"{folder} has no {wanted}; it has {', '.join(other[:3])}, which its loader does not read",
            f"if this is the component's weights file, rename it to {wanted}",
        )
    if pickled:
        return EditorError(
            f"{folder} has its weights only as {pickled[0]}, a format that can run arbitrary code", convert
        )
    if other:
        return EditorError(
            f"{folder} has a LoRA ({other[0]}) but not the weights that it belongs to",
            "pass the folder of the base model, or of one into which the LoRA is merged",
        )
    return EditorError(f"{folder} has no weights: {wanted} is missing", AGAIN)


def _has_its_size(tensor: StoredTensor, offsets: Sequence[int]) -> bool:
    bits = _BITS.get(tensor.dtype)
    return bits is None or 8 * (int(offsets[1]) - int(offsets[0])) == bits * math.prod(tensor.shape)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def kind_of_file(start: bytes) -> str | None:
    """Say what a file is if its first bytes are not those of a safetensors file; None: it may be one."""
    if not start:
        return "is empty"
    if start[8:9] == b"{":  # a safetensors file; its first bytes are a number, so they may look like anything
        return None
    if start.startswith(_POINTER):
        return "is a Git LFS pointer: the file itself was not downloaded"
    if start.startswith(b"GGUF"):
        return "is a GGUF file: weights quantized for llama.cpp or ComfyUI"
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return "is a pickle of PyTorch, which can run arbitrary code"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not weights"
    return None


def _hint_for(start: bytes) -> str:
    if start.startswith(_POINTER):
        return "run `git lfs pull` in the folder's repository"
    if start.startswith(b"GGUF"):
        return FULL_PRECISION
    if start[:1] in (b"P", b"\x80"):
        return "convert the weights to safetensors with a tool that you trust"
    return AGAIN

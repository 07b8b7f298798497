"""One shard: a safetensors file with the K and V of consecutive rows, written in one piece, read through a memory map.

layer.{i}.k, layer.{i}.v   (N, P, H_kv, D)   stored as the codec says; i counts the kept layers
valid                      (N, P) bool       absent where every token of every row is valid
row, episode, frame, instruction   (N,) int64
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.manifest import sync_folder

INDEX_KEYS = ("row", "episode", "frame", "instruction")

_DTYPES: dict[str, tuple[npt.DTypeLike, torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.uint16, torch.bfloat16),  # numpy has no bfloat16: same bytes, seen as torch's type on the way out
    "I64": (np.int64, torch.int64),
    "I8": (np.int8, torch.int8),
    "U8": (np.uint8, torch.uint8),
    "BOOL": (np.bool_, torch.bool),
}
_MAX_HEADER = 16 * 2**20


def write_shard(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write atomically and durably; returns (bytes, sha256)."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return len(data), hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard: `tensors[name]` is a numpy view of the file."""

    path: Path
    views: dict[str, tuple[npt.NDArray[np.generic], torch.dtype]]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map the file.

        Raises:
            CacheError: missing, or a header that does not describe this file.
        """
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    raise CacheError(f"{path} is damaged: its header claims {length} bytes of {size}", _REBUILD)
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is not a mapping")
            mapped = np.memmap(path, mode="r", dtype=np.uint8)
            start = 8 + length
            return cls(path, {k: _view(mapped, start, v) for k, v in header.items() if k != "__metadata__"})
        except FileNotFoundError:
            raise CacheError(f"{path} is missing", _REBUILD) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged: {error}", _REBUILD) from None

    def __contains__(self, name: str) -> bool:
        return name in self.views

    def array(self, name: str) -> npt.NDArray[np.generic]:
        return self.views[name][0]

    def take(self, name: str, rows: npt.NDArray[np.int64]) -> Tensor:
        """Copy of the given rows as a tensor."""
        return self.joined(name, [(self, np.arange(len(rows)), rows)])

    @staticmethod
    def joined(name: str, parts: Sequence[tuple[Shard, npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> Tensor:
        """One tensor of rows from several shards; a part is (shard, places in the tensor, rows of the shard)."""
        array, dtype = parts[0][0].views[name]
        rows = np.empty((sum(len(places) for _, places, _ in parts), *array.shape[1:]), array.dtype)
        for shard, places, taken in parts:
            rows[places] = shard.array(name)[taken]
        return torch.from_numpy(rows).view(dtype)


_REBUILD = "delete the file and run the same `imagewam cache` command again"


def _view(
    mapped: npt.NDArray[np.uint8], start: int, entry: dict[str, object]
) -> tuple[npt.NDArray[np.generic], torch.dtype]:
    numpy_type, torch_type = _DTYPES[str(entry["dtype"])]
    begin, end = (int(x) for x in entry["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(x) for x in entry["shape"])  # type: ignore[attr-defined]
    if not 0 <= begin <= end <= len(mapped) - start:
        raise ValueError(f"a tensor ends at {end}, the file at {len(mapped) - start}")
    return mapped[start + begin : start + end].view(numpy_type).reshape(shape), torch_type

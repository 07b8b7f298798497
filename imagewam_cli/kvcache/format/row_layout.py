"""Layout of a row in memory: its tensors side by side, in the order that its checksum covers.

A shard file has the opposite order: safetensors stores all rows of one tensor, then all rows of the next. In memory
each row is contiguous, so its checksum is a single call and a batch moves to a worker or a device in one piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from imagewam_cli.kvcache.format.buffers import ALIGNMENT, Bytes, aligned
from imagewam_cli.kvcache.format.part import Part


@dataclass(frozen=True)
class RowLayout:
    """The tensors of a row, in order."""

    parts: Mapping[str, Part]

    @classmethod
    def from_parts(cls, parts: Mapping[str, Part]) -> RowLayout:
        """Return the layout for writing: wide dtypes first, so that every tensor is aligned to its item size."""
        return cls(dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize)))

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Slice of each tensor in the bytes of a row."""
        slices, at = {}, 0
        for name, part in self.parts.items():
            slices[name] = slice(at, at := at + part.row_bytes)
        return slices

    @functools.cached_property
    def bytes(self) -> int:
        """Number of bytes in a row."""
        return sum(part.row_bytes for part in self.parts.values())

    @property
    def aligned(self) -> bool:
        """True if every tensor is aligned to its item size."""
        return not any(self.slices[name].start % part.dtype.itemsize for name, part in self.parts.items())

    def blank(self, rows: int, memory: Callable[[int], Bytes] | None = None) -> Bytes:
        """Allocate memory for rows, (rows, bytes plus zero padding). memory: allocates uninitialized bytes."""
        stride = -(-max(1, self.bytes) // ALIGNMENT) * ALIGNMENT
        blank = (memory or aligned)(rows * stride).reshape(rows, stride)
        blank[:, self.bytes :] = 0
        return blank

    def tensors(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the tensors, (N, ...) each, as views of the rows. rows: uint8, shaped like those of `blank`."""
        return {
            name: rows[:, self.slices[name]].view(part.dtype).reshape(len(rows), *part.shape)
            for name, part in self.parts.items()
        }

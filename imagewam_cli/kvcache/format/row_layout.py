"""The tensors of a row, side by side: what its checksum goes over, and how a batch stands in memory.

A shard has them the other way round, all rows of a tensor after each other, as safetensors wants it. In memory a row is
one piece: its checksum is one call that needs no Python, and a batch goes to a worker or a device in one.
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
    """Which tensors a row has, and in which order they stand."""

    parts: Mapping[str, Part]

    @classmethod
    def of(cls, parts: Mapping[str, Part]) -> RowLayout:
        """As it is written: wide numbers first, so that each tensor begins at a multiple of its numbers' size."""
        return cls(dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize)))

    @functools.cached_property
    def places(self) -> dict[str, slice]:
        """Of each tensor in the bytes of a row."""
        places, at = {}, 0
        for name, part in self.parts.items():
            places[name] = slice(at, at := at + part.row_bytes)
        return places

    @functools.cached_property
    def bytes(self) -> int:
        """Of a row."""
        return sum(part.row_bytes for part in self.parts.values())

    @property
    def aligned(self) -> bool:
        """Whether each tensor begins at a multiple of its numbers' size."""
        return not any(self.places[name].start % part.dtype.itemsize for name, part in self.parts.items())

    def blank(self, rows: int, memory: Callable[[int], Bytes] | None = None) -> Bytes:
        """Memory for rows, (rows, bytes and a few zeros behind them). memory: gives so many bytes, of any content."""
        stride = -(-max(1, self.bytes) // ALIGNMENT) * ALIGNMENT
        blank = (memory or aligned)(rows * stride).reshape(rows, stride)
        blank[:, self.bytes :] = 0
        return blank

    def tensors(self, rows: Tensor) -> dict[str, Tensor]:
        """(N, ...) each, in the memory of the rows: contiguous within a row. rows: uint8, as of `blank`."""
        return {
            name: rows[:, self.places[name]].view(part.dtype).reshape(len(rows), *part.shape)
            for name, part in self.parts.items()
        }

"""What a shard stores of one row: tensors of a fixed shape and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Part:
    """A tensor that is stored for each row: its shape without the rows, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return prod(self.shape) * self.dtype.itemsize

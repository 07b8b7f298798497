"""Describe the tensors that a shard stores for each row, by shape and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Part:
    """One tensor of a row: its shape without the row axis, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return prod(self.shape) * self.dtype.itemsize

"""How numbers of keys and values are stored. A codec is a pure pair of functions; it knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """encode and decode work on K or V of one layer, (N, P, H_kv, D)."""

    @property
    def name(self) -> str: ...

    @property
    def bytes_per_number(self) -> int: ...

    @property
    def stored_dtype(self) -> torch.dtype: ...

    def encode(self, values: Tensor) -> Tensor:
        """What goes into the shard."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """float32 values from what came out of the shard."""
        ...


@dataclass(frozen=True)
class CastCodec:
    """Stores every number in another float type: exact for `float32`, rounded to nearest for the others."""

    name: str
    stored_dtype: torch.dtype

    @property
    def bytes_per_number(self) -> int:
        return self.stored_dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        return values.to(self.stored_dtype)

    def decode(self, stored: Tensor) -> Tensor:
        return stored.to(torch.float32)


FLOAT32 = CastCodec("float32", torch.float32)
BFLOAT16 = CastCodec("bfloat16", torch.bfloat16)
FLOAT16 = CastCodec("float16", torch.float16)

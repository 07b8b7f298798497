"""The prefix itself: keys and values of every kept layer, for a batch of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one attention layer: k, v (B, P, H_kv, D), as the softmax sees them."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of a batch: one `LayerKV` (B, P, H_kv, D) per kept layer, and which tokens count.

    P may differ between layers (a UNet's). valid: bool (B, P) for the layers that hold text, whose P is one and the
    same; tokens of other layers always count. None: all tokens do.
    """

    layers: tuple[LayerKV, ...]
    valid: torch.Tensor | None

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self.layers[0].k.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PrefixKV:
        """The same on another device, K and V in another dtype where one is given."""
        valid = None if self.valid is None else self.valid.to(device)
        return PrefixKV(tuple(type(kv)(kv.k.to(device, dtype), kv.v.to(device, dtype)) for kv in self.layers), valid)

    def repeat(self, times: int) -> PrefixKV:
        """The batch `times` over, in whole turns: rows 0..B-1, then 0..B-1 again."""
        valid = None if self.valid is None else self.valid.repeat(times, 1)
        layers = tuple(type(kv)(kv.k.repeat(times, 1, 1, 1), kv.v.repeat(times, 1, 1, 1)) for kv in self.layers)
        return PrefixKV(layers, valid)

"""A prefix: keys and values of every kept layer, for a batch of rows."""

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
    """Keys and values of a batch."""

    layers: tuple[LayerKV, ...]
    """K and V of each kept layer, (B, P, H_kv, D). P may differ between layers, as in a UNet."""
    valid: torch.Tensor | None
    """bool (B, P), False at padding, for the layers that hold text; these have the same P. Other layers have no
    padding. None: no layer holds text or padding."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self.layers[0].k.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PrefixKV:
        """Return the prefix on another device, K and V converted to `dtype` if one is given."""
        valid = None if self.valid is None else self.valid.to(device)
        return PrefixKV(tuple(type(kv)(kv.k.to(device, dtype), kv.v.to(device, dtype)) for kv in self.layers), valid)

    def repeat(self, times: int) -> PrefixKV:
        """Return the batch repeated as a whole: rows 0..B-1, then 0..B-1 again."""
        valid = None if self.valid is None else self.valid.repeat(times, 1)
        layers = tuple(type(kv)(kv.k.repeat(times, 1, 1, 1), kv.v.repeat(times, 1, 1, 1)) for kv in self.layers)
        return PrefixKV(layers, valid)

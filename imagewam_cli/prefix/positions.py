"""Keys without their rotary positions, and with them again: what a layout's ids are good for without the editor."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewam_cli.prefix.rotary import rotary_tables
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, SegmentSpec

_CPU = torch.device("cpu")


def segment_ids(segment: SegmentSpec) -> Tensor:
    """Rotary ids of a segment's tokens, float32 (tokens, axes). Its positions must be known."""
    ids = segment.position_ids
    assert ids is not None
    return torch.from_numpy(ids)


def layer_ids(layer: LayerSpec) -> Tensor | None:
    """Rotary ids of a layer's tokens, float32 (P, axes); None where those of a segment are not known."""
    if any(segment.positions is None for segment in layer.segments):
        return None
    return torch.cat([segment_ids(segment) for segment in layer.segments])


def unrotate(k: Tensor, ids: Tensor, rope: RopeSpec) -> Tensor:
    """Keys as they were before the editor rotated them: float32 (B, P, G, D), on the device of `k`.

    k: (B, P, G, D); ids: (P, axes).
    """
    return _backwards(k, *tables(ids, rope, k.device))


def rotate_keys(k: Tensor, ids: Tensor, rope: RopeSpec) -> Tensor:
    """Keys at the positions `ids` (P, axes), as the editor rotates them: float32 (B, P, G, D). The inverse of
    `unrotate`."""
    return _turned(k, *tables(ids, rope, k.device))


def tables(ids: Tensor, rope: RopeSpec, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """cos and sin of the editor's angles, float32 (P, D / 2)."""
    # on the CPU, as not every device has float64
    cos, sin = rotary_tables(ids.to(_CPU), rope.axes, rope.theta, rope.rounding)
    return cos.to(device), sin.to(device)


def _backwards(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # rounded cosines and sines also stretch: by the root of this
    square = cos.square() + sin.square()
    return _turned(k, cos / square, -sin / square)


def _turned(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The numbers of `rotate`, bit for bit, of float32 keys; without its strided halves, four times as fast on a
    processor. Not for gradients or graphs."""
    k = k.float()
    neighbour = torch.arange(k.shape[-1], device=k.device) ^ 1
    swapped = k.reshape(-1, k.shape[-1]).index_select(1, neighbour).view(k.shape)
    cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    return (k * cos[:, None]).add_(swapped.mul_(sin[:, None]))

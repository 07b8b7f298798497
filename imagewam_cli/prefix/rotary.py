"""Rotary angles of tokens with several position axes, for both the editor's keys and the expert's queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagewam_cli.prefix.rounding import ROUNDINGS
from imagewam_cli.prefix.spec import RoundingName


def rotary_tables(ids: Tensor, axes: Sequence[int], theta: float, rounding: RoundingName) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 (T, sum(axes) / 2), of position ids (T, axes).

    Axis i contributes the angles id_i / theta^(2 j / dim_i). Ids, frequencies and angles have the rounding's dtype.
    """
    dtype: torch.dtype = getattr(torch, ROUNDINGS[rounding].angle_dtype)
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        angles.append(ids[:, axis, None].to(dtype) * (1.0 / theta**exponents))
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2 j, 2 j + 1) of the last axis of x (.., T, H, D). cos, sin: (T, D / 2). Computes in
    float32."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)

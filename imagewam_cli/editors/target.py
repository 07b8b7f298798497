"""Substitutes for the target picture, which an editor would generate: the same noise in every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def target_noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return seeded noise in place of a target: `shape` (B, ...), the same noise in every row.

    It is drawn on the CPU in float32, so it does not depend on device, dtype or batch size. like: a tensor of the
    requested device and dtype.
    """
    noise = torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.expand(tuple(shape)).to(like)


def flow_target(reference: Tensor, timestep: float) -> Tensor:
    """Return the noisy target of editors trained by flow matching, (1 - t) x + t noise.

    reference: tokens or latents (B, ...) of the current picture, which replaces the unknown target x. At t = 1, where a
    pipeline starts, the result is noise alone.
    """
    noise = target_noise(reference.shape, reference)
    return noise if timestep == 1.0 else (1 - timestep) * reference + timestep * noise

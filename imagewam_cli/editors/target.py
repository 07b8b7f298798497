"""What stands in place of the picture that an editor would make: noise, the same in every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def target_noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """The seeded noise that stands in place of a target: (B, ...) with the same noise in every row.

    Drawn on the CPU in float32, so that it is the same on every device and in every dtype and batch.
    """
    noise = torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.expand(tuple(shape)).to(like)


def flow_target(reference: Tensor, timestep: float) -> Tensor:
    """What stands in place of a target at a noise level, for editors trained by flow matching: (1 - t) x + t noise.

    reference: tokens or latents (B, ...) of the current picture, which stands for the target while none is known; at
    t = 1 it is noise alone, as where a pipeline starts.
    """
    noise = target_noise(reference.shape, reference)
    return noise if timestep == 1.0 else (1 - timestep) * reference + timestep * noise

"""From noise to an action chunk: plain Euler steps along the expert's velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewam_cli.expert.flow import TRAIN_STEPS, FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.prefix.kv import PrefixKV


def integrate(
    expert: ActionExpert,
    noise: Tensor,
    state: Tensor | None,
    prefix: PrefixKV | None,
    schedule: FlowSchedule,
    steps: int,
) -> Tensor:
    """Normalised chunk (B, T, A) from `noise` (B, T, A) in `steps` Euler steps, in the precision of the noise.

    In less than float32 it is 1000 t that is rounded, as published.
    """
    grid = schedule.grid(steps).to(noise.device)
    times = grid if noise.dtype == torch.float32 else (TRAIN_STEPS * grid).to(noise.dtype) / TRAIN_STEPS
    x = noise
    for i in range(steps):
        x = x + (grid[i + 1] - grid[i]).to(noise.dtype) * expert(x, times[i].expand(len(x)), state, prefix)
    return x


def initial_noise(count: int, horizon: int, action_dim: int, seed: int) -> Tensor:
    """float32 (count, T, A): the same start for every chunk, as published (one seed, used again at each replan)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, horizon, action_dim, generator=generator).expand(count, -1, -1).contiguous()

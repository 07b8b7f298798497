"""From noise to an action chunk: plain Euler steps along the expert's velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewam_cli.editor import PrefixKV
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert


def integrate(
    expert: ActionExpert,
    noise: Tensor,
    state: Tensor | None,
    prefix: PrefixKV | None,
    schedule: FlowSchedule,
    steps: int,
) -> Tensor:
    """Normalised chunk (B, T, A) from `noise` (B, T, A) in `steps` Euler steps."""
    grid = schedule.grid(steps).to(noise.device)
    x = noise
    for i in range(steps):
        t = grid[i].expand(len(x)).to(noise.dtype)
        x = x + (grid[i + 1] - grid[i]).to(noise.dtype) * expert(x, t, state, prefix)
    return x


def initial_noise(count: int, horizon: int, action_dim: int, seed: int) -> Tensor:
    """float32 (count, T, A): the same start for every chunk, as published (one seed, used again at each replan)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, horizon, action_dim, generator=generator).expand(count, -1, -1).contiguous()

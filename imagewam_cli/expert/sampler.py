"""Turn noise into an action chunk: Euler steps along the expert's velocity."""

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
    """Integrate `noise` (B, T, A) in `steps` Euler steps to a normalized chunk (B, T, A), in the noise's precision.

    Below float32, 1000 t is rounded instead of t, as in the published code.
    """
    grid = schedule.grid(steps).to(noise.device)
    times = grid if noise.dtype == torch.float32 else (TRAIN_STEPS * grid).to(noise.dtype) / TRAIN_STEPS
    x = noise
    for i in range(steps):
        x = x + (grid[i + 1] - grid[i]).to(noise.dtype) * expert(x, times[i].expand(len(x)), state, prefix)
    return x


def initial_noise(count: int, horizon: int, action_dim: int, seed: int) -> Tensor:
    """Return the initial noise, float32 (count, T, A); it is the same for every chunk and every replan.

    The published code also reuses one seed at each replan.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, horizon, action_dim, generator=generator).expand(count, -1, -1).contiguous()

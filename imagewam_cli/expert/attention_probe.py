"""Where the action tokens look: the weights of the expert's attention, seen while a chunk is denoised.

They are the numbers that the softmax of `attention.joint_attention` gives, observed from outside: no block knows of it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.prefix.capture import SOFTMAX, observe
from imagewam_cli.prefix.kv import PrefixKV

_BLOCKS = {"sequential": "double_blocks", "parallel": "single_blocks"}


def action_attention(
    expert: ActionExpert,
    noise: Tensor,
    state: Tensor | None,
    prefix: PrefixKV | None,
    schedule: FlowSchedule,
    steps: int,
) -> tuple[Tensor, ...]:
    """Attention of the action tokens in each layer, float64 (B, P + own) on the CPU: the mean over the layer's blocks,
    heads, action tokens and Euler steps, over [prefix tokens | state token, where there is one, and action tokens].
    Rows sum to 1.

    The state token's own queries do not count. Arguments as for `sampler.integrate`; P may differ by layer.
    """
    names = block_names(expert.config)
    seen: dict[str, Tensor] = {}

    def see(name: str, weights: Tensor) -> None:
        """weights: (B, H, own, P + own)."""
        of_actions = weights[:, :, -expert.config.horizon :].float().mean(dim=(1, 2)).cpu().double() / steps
        seen[name] = seen[name] + of_actions if name in seen else of_actions

    with torch.no_grad(), observe(expert, names, SOFTMAX, see):
        integrate(expert, noise, state, prefix, schedule, steps)
    several = expert.config.blocks_per_layer
    of_blocks = [seen[name] for name in names]
    return tuple(torch.stack(of_blocks[i : i + several]).mean(0) for i in range(0, len(names), several))


def block_names(config: ExpertConfig) -> tuple[str, ...]:
    """The expert's modules in the order of their work: `blocks_per_layer` beside each editor layer."""
    counts = {kind: itertools.count() for kind in _BLOCKS}
    return tuple(f"{_BLOCKS[layer.block]}.{next(counts[layer.block])}" for layer in config.blocks)


def untrained_expert(config: ExpertConfig, seed: int = 0) -> ActionExpert:
    """An expert as training starts with it. Its output is zero, its attention is not: what the editor's keys alone draw
    from random queries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expert = ActionExpert(config)
    return expert.eval().requires_grad_(False)

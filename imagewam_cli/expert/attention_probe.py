"""Record the expert's attention weights while it denoises a chunk.

The weights are the outputs of the softmax in `attention.joint_attention`, observed from outside the blocks.
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
    """Return the attention of the action tokens in each layer, float64 (B, P + own) on the CPU.

    The weights are averaged over the layer's blocks, heads, action tokens and Euler steps. Keys are [prefix tokens |
    state token, if the expert has one | action tokens]; rows sum to 1. P may differ between layers. The state token's
    queries are omitted. Arguments are those of `sampler.integrate`.
    """
    names = block_names(expert.config)
    sums: dict[str, Tensor] = {}

    def add(name: str, weights: Tensor) -> None:
        """Add one block's weights at one Euler step, (B, H, own, P + own)."""
        of_actions = weights[:, :, -expert.config.horizon :].float().mean(dim=(1, 2)).cpu().double() / steps
        sums[name] = sums[name] + of_actions if name in sums else of_actions

    with torch.no_grad(), observe(expert, names, SOFTMAX, add):
        integrate(expert, noise, state, prefix, schedule, steps)
    several = expert.config.blocks_per_layer
    of_blocks = [sums[name] for name in names]
    return tuple(torch.stack(of_blocks[i : i + several]).mean(0) for i in range(0, len(names), several))


def block_names(config: ExpertConfig) -> tuple[str, ...]:
    """Return the names of the expert's blocks in the order of execution, `blocks_per_layer` per editor layer."""
    counts = {kind: itertools.count() for kind in _BLOCKS}
    return tuple(f"{_BLOCKS[layer.block]}.{next(counts[layer.block])}" for layer in config.blocks)


def untrained_expert(config: ExpertConfig, seed: int = 0) -> ActionExpert:
    """Return an expert with initial weights. Its output is zero, but its attention is not.

    This shows how much attention the editor's keys attract from random queries.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expert = ActionExpert(config)
    return expert.eval().requires_grad_(False)

"""The action expert: one or more blocks per kept editor layer, predicting the velocity of a noisy action chunk.

The state enters on the action side, as one token before the actions and in the modulation vector, so the prefix depends
only on pictures and instruction. With `state_dim` 0 the model is the published expert, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewam_cli.errors import ConfigError
from imagewam_cli.expert.attention import Rotary
from imagewam_cli.expert.blocks import Head, Modulation, ParallelBlock, SequentialBlock, TimeEmbedding
from imagewam_cli.expert.token_coordinates import TokenCoordinates
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.rounding import ROUNDINGS
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, RoundingName

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Sizes of an expert. `layers` and `rope` describe the prefix that the expert attends to."""

    layers: tuple[LayerSpec, ...]
    rope: RopeSpec | None
    action_dim: int
    state_dim: int
    horizon: int
    hidden: int = 256
    mlp_ratio: float = 4.0
    places: bool = False
    """Whether token coordinates are added to the prefix's values (`TokenCoordinates`); False in published experts."""
    use_prefix: bool = True
    """False: ignore the prefix, to measure how well the state alone predicts actions."""
    blocks_per_layer: int = 1
    """Number of consecutive blocks per layer; more blocks keep the expert deep when few layers are kept."""
    rounding: RoundingName = "exact"

    def __post_init__(self) -> None:
        sizes = (self.action_dim, self.horizon, self.hidden, self.blocks_per_layer)
        if min(sizes) < 1 or self.state_dim < 0 or not self.layers:
            raise ConfigError("an expert needs at least one layer, block, action, step and hidden channel")
        if self.rope is not None:
            for layer in self.layers:
                if sum(self.rope.axes) != layer.head_dim:
                    raise ConfigError(
                        f"rope axes {self.rope.axes} rotate {sum(self.rope.axes)} numbers, "
                        f"but the heads of {layer.name} have {layer.head_dim}"
                    )

    @property
    def blocks(self) -> tuple[LayerSpec, ...]:
        """Layer that each block attends to."""
        return self.per_block(self.layers)

    def per_block(self, of_layers: Sequence[T]) -> tuple[T, ...]:
        """Repeat each layer's item once for each of its blocks."""
        return tuple(x for x in of_layers for _ in range(self.blocks_per_layer))


class ActionExpert(nn.Module):
    """Transformer that predicts a velocity: expert(noisy_actions, t, state, prefix)."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.action_encoder = nn.Linear(config.action_dim, hidden)
        self.state_encoder = (
            nn.Sequential(nn.Linear(config.state_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            if config.state_dim
            else None
        )
        self.time_in = TimeEmbedding(hidden)
        kinds = [layer.block for layer in config.layers]
        self.double_stream_modulation_img = Modulation(hidden, 2) if "sequential" in kinds else None
        self.single_stream_modulation = Modulation(hidden, 1) if "parallel" in kinds else None
        self.double_blocks = nn.ModuleList(
            SequentialBlock(hidden, config.mlp_ratio, layer) for layer in config.blocks if layer.block == "sequential"
        )
        self.single_blocks = nn.ModuleList(
            ParallelBlock(hidden, config.mlp_ratio, layer) for layer in config.blocks if layer.block == "parallel"
        )
        self.head = Head(hidden, config.action_dim)
        self.places = TokenCoordinates(config.layers) if config.places and config.use_prefix else None
        # Positions along the action axis: the state token comes just before the first action.
        positions = torch.arange(-1 if config.state_dim else 0, config.horizon)
        self.rotary = Rotary(config.rope, positions, config.rounding) if config.rope is not None else None
        self.positions = None if config.rope is not None else nn.Parameter(torch.zeros(len(positions), hidden))
        self._initialize()
        if ROUNDINGS[config.rounding].compute_dtype == "bfloat16":
            to_bfloat16(self)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, and of the actions and prefixes that the expert takes."""
        return self.action_encoder.weight.dtype

    def forward(self, noisy_actions: Tensor, t: Tensor, state: Tensor | None, prefix: PrefixKV | None) -> Tensor:
        """Predict the velocity (B N, T, A) of noisy normalized chunks.

        noisy_actions: (B N, T, A); t: (B N,) in [0, 1]; state: (B N, S) normalized, None iff `state_dim` is 0;
        prefix: B rows, each shared by N consecutive chunks, or None.
        """
        x = self.action_encoder(noisy_actions)
        vec = self.time_in(t)
        if self.state_encoder is not None:
            embedded = self.state_encoder(state)
            vec = vec + embedded
            x = torch.cat([embedded[:, None, :], x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        layers: tuple[LayerKV | None, ...] = (None,) * len(self.config.layers)
        valid = None
        if prefix is not None and self.config.use_prefix:
            layers, valid = prefix.layers, prefix.valid
            if self.places is not None:
                layers = self.places(prefix.layers)
        double = self.double_stream_modulation_img(vec) if self.double_stream_modulation_img is not None else ()
        single = self.single_stream_modulation(vec) if self.single_stream_modulation is not None else ()
        doubles, singles = iter(self.double_blocks), iter(self.single_blocks)
        for layer, kv in zip(self.config.blocks, self.config.per_block(layers), strict=True):
            mask = valid if layer.holds_text else None  # only text is padded
            if layer.block == "sequential":
                x = next(doubles)(x, double, self.rotary, kv, mask)
            else:
                x = next(singles)(x, single, self.rotary, kv, mask)
        velocity: Tensor = self.head(x[:, -self.config.horizon :], vec)
        return velocity

    def _initialize(self) -> None:
        """Start with identity blocks and zero output; keep PyTorch's initial weights for everything else."""
        for modulation in (self.double_stream_modulation_img, self.single_stream_modulation):
            if modulation is not None:
                nn.init.zeros_(modulation.lin.weight)
        nn.init.zeros_(self.head.linear.weight)
        for parameter in self.head.adaLN_modulation.parameters():
            nn.init.zeros_(parameter)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)


def to_bfloat16(model: nn.Module) -> None:
    """Cast the weights to bfloat16 in place; buffers (angles, frequencies) stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def parameter_count(model: nn.Module) -> int:
    """Count the numbers in all parameters."""
    return sum(p.numel() for p in model.parameters())


def masked_flow_loss(
    predicted: Tensor, target: Tensor, is_pad: Tensor, weight: Tensor, dim_is_pad: Tensor | None = None
) -> Tensor:
    """Return the flow loss: squared error averaged over dimensions and real steps, weighted, then averaged over chunks.

    predicted, target: (N, T, A); is_pad: bool (N, T); weight: (N,); dim_is_pad: bool (N, A), dimensions that a robot
    lacks, or None. Computed in float32.
    """
    squared = F.mse_loss(predicted.float(), target.float(), reduction="none")
    if dim_is_pad is None:
        error = squared.mean(-1)
    else:
        real = (~dim_is_pad).float()[:, None, :]
        error = (squared * real).sum(-1) / real.sum(-1).clamp(min=1)
    keep = (~is_pad).float()
    per_sample = (error * keep).sum(-1) / keep.sum(-1).clamp(min=1)
    return (per_sample * weight).mean()

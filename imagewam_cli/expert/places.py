"""Where in the picture a prefix token lies, told to the expert with the token's value.

A rotary editor keeps positions out of its values: they turn queries and keys only. Attention can then compare places,
but what it returns does not say which place it looked at, and an arm needs to know exactly that. So each layer's values
get a learned linear map of the token's coordinates added: attending to a block returns where it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from imagewam_cli.capture import LayerKV
from imagewam_cli.errors import ConfigError
from imagewam_cli.kvcache.spec import LayerSpec, SegmentSpec

_OCTAVES = 3
PLACE_FEATURES = 2 + 4 * _OCTAVES


def place_features(grid: tuple[int, int]) -> Tensor:
    """float32 (rows * columns, 14), rows first: y and x of each token's centre in [-1, 1], then sines and cosines of
    pi, 2 pi and 4 pi times them."""
    y, x = ((torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1 for side in grid)
    places = torch.cartesian_prod(y, x)
    angles = torch.cat([math.pi * 2**octave * places for octave in range(_OCTAVES)], dim=-1)
    return torch.cat([places, angles.sin(), angles.cos()], dim=-1)


class PrefixPlaces(nn.Module):
    """Adds a learned map of its place to the value of each picture token, in every layer."""

    features: Tensor

    def __init__(self, segments: tuple[SegmentSpec, ...], layers: tuple[LayerSpec, ...]) -> None:
        """segments: of the prefix, text before pictures; the text of a live policy may have another length.

        Raises:
            ConfigError: no pictures, or text that comes after one.
        """
        super().__init__()
        pictures = [s for s in segments if s.grid is not None]
        if not pictures or pictures != list(segments[-len(pictures) :]):
            raise ConfigError(f"places need picture tokens, after the text; the segments are {segments}")
        text = torch.zeros(1, PLACE_FEATURES)  # the one row for every token before the pictures
        features = torch.cat([text, *(place_features(s.grid) for s in pictures if s.grid is not None)])
        self.register_buffer("features", features, persistent=False)
        self.maps = nn.ModuleList(
            nn.Linear(PLACE_FEATURES, layer.kv_heads * layer.head_dim, bias=False) for layer in layers
        )

    def forward(self, layers: tuple[LayerKV, ...]) -> tuple[LayerKV, ...]:
        """k, v (B, P, G, D) of each layer -> the same k, and v with places."""
        return tuple(self._placed(kv, place_map) for kv, place_map in zip(layers, self.maps, strict=True))

    def _placed(self, kv: LayerKV, place_map: nn.Module) -> LayerKV:
        rows, length = len(self.features), kv.v.shape[1]
        # counted from the end; indices, because a slice from the end stops the tracer where the length may vary
        row = (torch.arange(length, device=kv.v.device) + (rows - length)).clamp(min=0)
        added = place_map(self.features).view(rows, *kv.v.shape[2:])[row]
        return LayerKV(kv.k, kv.v + added.to(kv.v.dtype))

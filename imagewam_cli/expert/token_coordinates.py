"""Add a prefix token's picture coordinates to its value, so that the attention output contains positions.

A rotary editor rotates queries and keys by their positions but keeps positions out of its values. Attention can then
compare positions, but its output does not contain them, and a robot arm needs exactly that. So a learned linear map of
the token's coordinates is added to the values of each layer: attending to an object then returns its position. In a
layer with several pictures (separate cameras, or a reference and a target) the map also gets the picture's index,
one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imagewam_cli.errors import ConfigError
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.spec import LayerSpec, SegmentSpec

_OCTAVES = 3
COORDINATE_FEATURES = 2 + 4 * _OCTAVES


def coordinate_features(grid: tuple[int, int], extent: tuple[float, float] | None = None) -> Tensor:
    """Return coordinate features of a grid of tokens, float32 (rows * columns, 14), row by row.

    The features are y and x of the token's center in [-1, 1], then the sines, then the cosines, of pi, 2 pi and 4 pi
    times them.

    extent: (height, width) of the picture in tokens, if the last row or column extends beyond the picture; the visible
        part then determines the center.
    """
    y, x = (_centers(side, whole) for side, whole in zip(grid, extent or grid, strict=True))
    centers = torch.cartesian_prod(y, x)
    angles = torch.cat([math.pi * 2**octave * centers for octave in range(_OCTAVES)], dim=-1)
    return torch.cat([centers, angles.sin(), angles.cos()], dim=-1)


def _centers(count: int, whole: float) -> Tensor:
    """Return the centers, from -1 to 1, of `count` tokens along a side that is `whole` tokens long."""
    edges = torch.arange(count + 1, dtype=torch.float32).clamp(max=whole)
    return (edges[:-1] + edges[1:]) / whole - 1


def picture_features(pictures: Sequence[SegmentSpec]) -> Tensor:
    """Return the features of consecutive pictures: float32 (tokens, 14) for one, (tokens, 14 + N) for N > 1.

    The last N columns are the picture's index, one-hot. Every segment must have a grid.
    """
    features = torch.cat([coordinate_features(s.grid, s.extent) for s in pictures if s.grid is not None])
    if len(pictures) == 1:
        return features
    each = torch.eye(len(pictures)).repeat_interleave(torch.tensor([s.tokens for s in pictures]), dim=0)
    return torch.cat([features, each], dim=1)


class TokenCoordinates(nn.Module):
    """Add a learned map of its coordinates to the value of each picture token, in every layer with pictures."""

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        """Create one map per layer with pictures. Text must come before pictures; its length may vary.

        Raises:
            ConfigError: a layer has text after a picture, or no layer has a picture.
        """
        super().__init__()
        pictures = {str(i): layer for i, layer in enumerate(layers) if layer.holds_pictures}
        if not pictures:
            raise ConfigError("expert.places needs picture tokens, but no layer has any")
        self.maps = nn.ModuleDict({i: _CoordinateMap(layer) for i, layer in pictures.items()})

    def forward(self, layers: tuple[LayerKV, ...]) -> tuple[LayerKV, ...]:
        """Return each layer's k, v (B, P, G, D) with coordinates added to v."""
        placed = list(layers)
        for i, coordinate_map in self.maps.items():
            k, v = layers[int(i)].k, layers[int(i)].v
            placed[int(i)] = LayerKV(k, v + coordinate_map(v.shape[1]).to(v.dtype))
        return tuple(placed)


class _CoordinateMap(nn.Module):
    """The map of one layer."""

    features: Tensor

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        pictures = [s for s in layer.segments if s.grid is not None]
        if list(layer.segments[-len(pictures) :]) != pictures:
            raise ConfigError(f"expert.places needs text before pictures, but {layer.name} has {layer.segments}")
        features = picture_features(pictures)
        text = features.new_zeros(1, features.shape[1])  # one row of zeros, shared by all tokens before the pictures
        self.register_buffer("features", torch.cat([text, features]), persistent=False)
        self.linear = nn.Linear(features.shape[1], layer.kv_heads * layer.head_dim, bias=False)
        self.shape = (layer.kv_heads, layer.head_dim)

    def forward(self, length: int) -> Tensor:
        """Return what to add to the values of `length` tokens, (length, G, D); the pictures' tokens are last."""
        rows = len(self.features)
        # Counted from the end, as the text's length varies. Indices instead of a slice, which torch cannot trace for a
        # variable length.
        row = (torch.arange(length, device=self.features.device) + (rows - length)).clamp(min=0)
        added: Tensor = self.linear(self.features).view(rows, *self.shape)[row]
        return added

"""Where in the picture a prefix token lies, told to the expert with the token's value.

A rotary editor keeps positions out of its values: they turn queries and keys only. Attention can then compare places,
but what it returns does not say which place it looked at, and an arm needs to know exactly that. So each layer's values
get a learned linear map of the token's coordinates added: attending to a block returns where it is. In a layer with
several pictures (cameras apart, a reference and a target) the map is also told which of them a token belongs to.
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
PLACE_FEATURES = 2 + 4 * _OCTAVES


def place_features(grid: tuple[int, int], extent: tuple[float, float] | None = None) -> Tensor:
    """float32 (rows * columns, 14), rows first: y and x of each token's centre in [-1, 1], then sines and cosines of
    pi, 2 pi and 4 pi times them.

    extent: (height, width) of the picture in tokens, where it is less than the grid; the last tokens are then smaller.
    """
    y, x = (_centres(side, whole) for side, whole in zip(grid, extent or grid, strict=True))
    places = torch.cartesian_prod(y, x)
    angles = torch.cat([math.pi * 2**octave * places for octave in range(_OCTAVES)], dim=-1)
    return torch.cat([places, angles.sin(), angles.cos()], dim=-1)


def _centres(count: int, whole: float) -> Tensor:
    """Of `count` tokens in a line of `whole` tokens from -1 to 1."""
    edges = torch.arange(count + 1, dtype=torch.float32).clamp(max=whole)
    return (edges[:-1] + edges[1:]) / whole - 1


def picture_features(pictures: Sequence[SegmentSpec]) -> Tensor:
    """float32 (tokens, 14) of one picture; (tokens, 14 + N) of N > 1 one after another, with a one in the column of
    each token's picture. Each has a grid."""
    places = torch.cat([place_features(s.grid, s.extent) for s in pictures if s.grid is not None])
    if len(pictures) == 1:
        return places
    each = torch.eye(len(pictures)).repeat_interleave(torch.tensor([s.tokens for s in pictures]), dim=0)
    return torch.cat([places, each], dim=1)


class PrefixPlaces(nn.Module):
    """Adds a learned map of its place to the value of each picture token, in every layer that has any."""

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        """Text comes before pictures in every layer; the text of a live policy may have another length.

        Raises:
            ConfigError: a layer has text after a picture, or no layer has a picture.
        """
        super().__init__()
        pictures = {str(i): layer for i, layer in enumerate(layers) if layer.holds_pictures}
        if not pictures:
            raise ConfigError("places need picture tokens, and no layer has any")
        self.maps = nn.ModuleDict({i: _PlaceMap(layer) for i, layer in pictures.items()})

    def forward(self, layers: tuple[LayerKV, ...]) -> tuple[LayerKV, ...]:
        """k, v (B, P, G, D) of each layer -> the same k, and v with places."""
        placed = list(layers)
        for i, place_map in self.maps.items():
            k, v = layers[int(i)].k, layers[int(i)].v
            placed[int(i)] = LayerKV(k, v + place_map(v.shape[1]).to(v.dtype))
        return tuple(placed)


class _PlaceMap(nn.Module):
    """What one layer adds to its values."""

    features: Tensor

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        pictures = [s for s in layer.segments if s.grid is not None]
        if list(layer.segments[-len(pictures) :]) != pictures:
            raise ConfigError(f"places need the text before the pictures; {layer.name} has {layer.segments}")
        features = picture_features(pictures)
        text = features.new_zeros(1, features.shape[1])  # the one row for every token before the pictures
        self.register_buffer("features", torch.cat([text, features]), persistent=False)
        self.linear = nn.Linear(features.shape[1], layer.kv_heads * layer.head_dim, bias=False)
        self.shape = (layer.kv_heads, layer.head_dim)

    def forward(self, length: int) -> Tensor:
        """(length, G, D), the last tokens being the pictures'."""
        rows = len(self.features)
        # counted from the end; indices, because a slice from the end stops the tracer where the length may vary
        row = (torch.arange(length, device=self.features.device) + (rows - length)).clamp(min=0)
        added: Tensor = self.linear(self.features).view(rows, *self.shape)[row]
        return added

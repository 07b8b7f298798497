"""Average each cell of N x N neighboring picture tokens into one token, for both keys and values.

Rotated keys are averaged without their rotation, because rotation turns neighbors to different angles and their mean
would cancel. The mean is then rotated to the cell's center. A cell that extends beyond the picture's edge is the mean
of the tokens that exist. Cameras side by side are one picture, so a cell may mix two cameras if a camera's number of
columns is not a multiple of N.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.positions import rotate_keys, segment_ids, unrotate
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec, SegmentSpec, TokenPositions


def pooled_layer(layer: LayerSpec, size: int, rope: RopeSpec | None) -> LayerSpec:
    """Return the layer with its pictures pooled in cells of `size` x `size` tokens.

    Raises:
        UsageError: keys are rotated, and a picture has no positions.
    """
    if size == 1:
        return layer
    unknown = [s.name for s in layer.segments if s.grid is not None and s.positions is None]
    if rope is not None and unknown:
        raise UsageError(
            f"{unknown[0]} tokens cannot be pooled: their keys are rotated, and the plugin declares no positions",
            "omit --pool, or add `positions` to the segment in the plugin",
        )
    return dataclasses.replace(layer, segments=tuple(pooled_segment(s, size) for s in layer.segments))


def pooled_segment(segment: SegmentSpec, size: int) -> SegmentSpec:
    """Return the segment with its picture pooled; a segment without a grid is returned as it is."""
    if size == 1 or segment.grid is None:
        return segment
    rows, columns = (-(-side // size) for side in segment.grid)
    height, width = (side / size for side in segment.extent or segment.grid)
    return dataclasses.replace(
        segment,
        tokens=rows * columns,
        grid=(rows, columns),
        extent=None if (height, width) == (rows, columns) else (height, width),
        positions=None if segment.positions is None else _centers(segment.positions, size),
    )


def _centers(positions: TokenPositions, size: int) -> TokenPositions:
    """Return the positions of the cells' centers. A cell at the edge has the center of a whole cell."""
    # distance from a cell's first token to its center, along every axis that grows with rows or columns
    distance = (size - 1) / 2 * positions.step
    origin = tuple(
        first + distance * sum(axis in axes for axes in positions.moves) for axis, first in enumerate(positions.origin)
    )
    return dataclasses.replace(positions, origin=origin, step=size * positions.step)


def pooled(kv: LayerKV, segment: SegmentSpec, size: int, rope: RopeSpec | None) -> LayerKV:
    """Pool keys and values of one segment, (B, tokens, G, D) -> (B, cells, G, D). Computes in float32, returns the
    input's dtype."""
    if size == 1 or segment.grid is None:
        return kv
    v = cell_means(kv.v.float(), segment.grid, size)
    if rope is None:
        k = cell_means(kv.k.float(), segment.grid, size)
    else:
        plain = cell_means(unrotate(kv.k, segment_ids(segment), rope), segment.grid, size)
        k = rotate_keys(plain, segment_ids(pooled_segment(segment, size)), rope)
    return LayerKV(k.to(kv.k.dtype), v.to(kv.v.dtype))


def pooled_prefix(spec: KVSpec, prefix: PrefixKV, size: int) -> tuple[KVSpec, PrefixKV]:
    """Return the layout and the prefix with their pictures pooled in cells of `size` x `size` tokens.

    Raises:
        UsageError: as `pooled_layer`.
    """
    layers = tuple(pooled_layer(layer, size, spec.rope) for layer in spec.layers)
    kept = tuple(
        LayerKV(*(torch.cat(parts, dim=1) for parts in zip(*_pooled_parts(kv, layer, size, spec.rope), strict=True)))
        for kv, layer in zip(prefix.layers, spec.layers, strict=True)
    )
    valid = prefix.valid
    text_layer = next((layer for layer in spec.layers if layer.holds_text), None)
    if valid is not None and text_layer is not None:
        # text keeps its padding; a pooled picture has fewer tokens, all valid
        pieces = torch.split(valid, [s.tokens for s in text_layer.segments], dim=1)
        valid = torch.cat(
            [
                piece if s.grid is None else piece.new_ones(len(piece), pooled_segment(s, size).tokens)
                for s, piece in zip(text_layer.segments, pieces, strict=True)
            ],
            dim=1,
        )
    return dataclasses.replace(spec, layers=layers), PrefixKV(kept, valid)


def _pooled_parts(kv: LayerKV, layer: LayerSpec, size: int, rope: RopeSpec | None) -> list[tuple[Tensor, Tensor]]:
    sizes = [s.tokens for s in layer.segments]
    pieces = zip(layer.segments, torch.split(kv.k, sizes, dim=1), torch.split(kv.v, sizes, dim=1), strict=True)
    found = [pooled(LayerKV(k, v), segment, size, rope) for segment, k, v in pieces]
    return [(x.k, x.v) for x in found]


def cell_means(tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Return the mean of each cell, (B, rows * columns, G, D) -> (B, cells, G, D)."""
    batch, _, *head = tokens.shape
    more = [-side % size for side in grid]  # rows and columns of zeros that complete the cells at the edge
    cells = [(side + added) // size for side, added in zip(grid, more, strict=True)]
    picture = F.pad(tokens.reshape(batch, *grid, *head), (0, 0, 0, 0, 0, more[1], 0, more[0]))
    sums = picture.reshape(batch, cells[0], size, cells[1], size, *head).sum((2, 4))
    # number of real tokens of each cell, so that the added zeros do not count in its mean
    down, across = (
        torch.tensor([min(size, side - size * i) for i in range(count)], dtype=tokens.dtype, device=tokens.device)
        for side, count in zip(grid, cells, strict=True)
    )
    means: Tensor = sums / (down[:, None] * across)[:, :, None, None]
    return means.flatten(1, 2)

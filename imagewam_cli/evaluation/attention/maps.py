"""Attention weights as maps over the picture, and which part of the picture changes. Arithmetic on numpy arrays alone.

A map is float64 (R, C) over the picture's token grid, row by row, and sums to 1. The pictures of several cameras stand
side by side, as the editor is given them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import CaptureError, RunError
from imagewam_cli.prefix.spec import LayerSpec

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Grid = tuple[int, int]

CHANGE_FRACTION = 0.25
"""A token changes where its mean absolute pixel difference is above this fraction of the largest token's."""
STILL = 2.0
"""Of 255. Where no token's mean absolute difference reaches it, nothing changes: a video codec's noise is smaller."""


def split(weights: Float64Array, layer: LayerSpec, own: int) -> tuple[Float64Array, ...]:
    """The attention (K,) of one row on each of the layer's segments, then on the chunk's `own` tokens, the last ones.

    Text is as long as the row's batch needs; `LayerSpec` says how long it was in the cache. So text takes what the
    other segments leave.

    Raises:
        CaptureError: the layer's tokens are not those that its segments say.
    """
    texts = [s.name for s in layer.segments].count("text")
    extra = len(weights) - own - layer.tokens
    if extra != 0 and texts != 1:
        raise CaptureError(f"layer {layer.name} has {len(weights) - own} prefix tokens, its segments {layer.tokens}")
    lengths = [s.tokens + (extra if s.name == "text" else 0) for s in layer.segments]
    return tuple(np.split(weights, np.cumsum(lengths)))


def shares(weights: Float64Array, layer: LayerSpec, own: int) -> dict[str, float]:
    """How much of the attention (K,) falls on each kind of segment and on the chunk's `own` tokens. Sums to 1."""
    found: dict[str, float] = {}
    for name, part in zip([*(s.name for s in layer.segments), "own"], split(weights, layer, own), strict=True):
        found[name] = found.get(name, 0.0) + float(part.sum())
    return found


def picture_map(weights: Float64Array, layer: LayerSpec, own: int, pictures: int = 1) -> Float64Array:
    """The attention (K,) on picture tokens as a map. Pictures of one kind stand side by side; kinds are added up, since
    a reference and a target show the same place.

    pictures: how many the cameras make, equally large. A kind with fewer, as the one target of several references,
    shows the first of them: no attention of its own falls on the others.

    Raises:
        CaptureError: the layer's tokens are not those that its segments say.
        RunError: no attention is left for the pictures, or it is no number.
    """
    kinds: dict[str, list[Float64Array]] = {}
    *parts, _ = split(weights, layer, own)
    for segment, part in zip(layer.segments, parts, strict=True):
        if segment.grid is not None:
            kinds.setdefault(segment.name, []).append(_evened(part.reshape(segment.grid), segment.extent))
    added = combined([_strip(found, pictures) for found in kinds.values()])
    total = float(added.sum())
    if not total > 0:
        raise RunError(
            f"the attention on the pictures of layer {layer.name} is {total}", "look at the policy's weights"
        )
    return added / total


def _evened(values: Float64Array, extent: tuple[float, float] | None) -> Float64Array:
    """A map whose last row and column reach over the picture's edge -> one of as many equal cells."""
    if extent is None:
        return values
    rows, columns = (_overlaps(n, n, whole) for n, whole in zip(values.shape, extent, strict=True))
    result: Float64Array = rows @ values @ columns.T
    return result


def _strip(found: Sequence[Float64Array], pictures: int) -> Float64Array:
    """Maps of one kind side by side, with zeros in place of those that `pictures` has more."""
    return np.concatenate([*found, *[np.zeros_like(found[0])] * (pictures - len(found))], axis=1)


def combined(maps: Sequence[Float64Array]) -> Float64Array:
    """The sum of maps over the same picture, on the grid with the most rows and the most columns of all."""
    rows, columns = zip(*(grid_of(m) for m in maps), strict=True)
    total: Float64Array = np.sum([resampled(m, (max(rows), max(columns))) for m in maps], axis=0)
    return total


def grid_of(values: npt.NDArray[np.generic]) -> Grid:
    """(R, C) of a map."""
    rows, columns = values.shape
    return rows, columns


def resampled(values: Float64Array, grid: Grid) -> Float64Array:
    """(R, C) -> `grid`, both over the same picture: what a cell holds is spread evenly over its area, nothing is
    lost."""
    rows, columns = (_overlaps(values.shape[axis], grid[axis]) for axis in (0, 1))
    result: Float64Array = rows @ values @ columns.T
    return result


def differences(now: UInt8Image, target: UInt8Image, grid: Grid) -> Float64Array:
    """Mean absolute difference of two pictures (H, W, 3), 0 to 255, in each cell of the grid."""
    pixels = np.abs(now.astype(np.float64) - target.astype(np.float64)).mean(axis=2)
    mean: Float64Array = resampled(pixels, grid) * (grid[0] * grid[1] / pixels.size)
    return mean


def changed(now: UInt8Image, target: UInt8Image, grid: Grid) -> BoolArray:
    """Which cells of the grid change: those above `CHANGE_FRACTION` of the greatest difference, so that neither
    contrast nor lighting counts. None where the pictures are equal."""
    difference = differences(now, target, grid)
    region: BoolArray = difference > CHANGE_FRACTION * difference.max()
    return region


def lift(values: Float64Array, region: BoolArray) -> float:
    """Mass of a map on a region that is not empty, over the region's share of the area. 1 for a uniform map."""
    return float(values[region].sum() / region.mean())


def lifts(maps: Float64Array, regions: BoolArray) -> Float64Array:
    """(N, N): `lift` of map i on region j. maps: (N, R, C); regions: (N, R, C), none empty."""
    mass = maps.reshape(len(maps), -1) @ regions.reshape(len(regions), -1).T.astype(np.float64)
    result: Float64Array = mass / regions.mean(axis=(1, 2))
    return result


def _overlaps(cells: int, into: int, whole: float | None = None) -> Float64Array:
    """(into, cells): the fraction of each cell of a line that lies in each cell of another division of that line.

    whole: length of the line in cells, where the last one ends with it; None: `cells`.
    """
    edges, others = np.minimum(np.arange(cells + 1) / (whole or cells), 1.0), np.arange(into + 1) / into
    low = np.maximum(edges[None, :-1], others[:-1, None])
    high = np.minimum(edges[None, 1:], others[1:, None])
    overlap: Float64Array = np.clip(high - low, 0.0, None) / np.diff(edges)
    return overlap

"""Turn attention weights into maps over the picture, and find the part of the picture that changes, in numpy.

A map is float64 (R, C), one value per token of the picture's grid, and sums to 1. Pictures of several cameras are side
by side, as in the editor's input.
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
"""A token counts as changed if its mean absolute pixel difference is above this fraction of the largest one."""
STILL = 2.0
"""Minimum mean absolute pixel difference (of 255) of some token for the row to count as changing.

The noise of a video codec is smaller.
"""


def split(weights: Float64Array, layer: LayerSpec, own: int) -> tuple[Float64Array, ...]:
    """Split one row's attention (K,) into the layer's segments and, last, the chunk's `own` tokens.

    The text may be shorter or longer than in the cache that `layer` describes, because its length depends on the
    batch. The text segment therefore takes all remaining tokens.

    Raises:
        CaptureError: the number of tokens does not match the layer's segments.
    """
    texts = [s.name for s in layer.segments].count("text")
    extra = len(weights) - own - layer.tokens
    if extra != 0 and texts != 1:
        raise CaptureError(
            f"layer {layer.name} has {len(weights) - own} prefix tokens, but its segments have {layer.tokens}"
        )
    lengths = [s.tokens + (extra if s.name == "text" else 0) for s in layer.segments]
    return tuple(np.split(weights, np.cumsum(lengths)))


def shares(weights: Float64Array, layer: LayerSpec, own: int) -> dict[str, float]:
    """Return the share of the attention (K,) on each kind of segment and on the chunk's `own` tokens. Sums to 1."""
    found: dict[str, float] = {}
    for name, part in zip([*(s.name for s in layer.segments), "own"], split(weights, layer, own), strict=True):
        found[name] = found.get(name, 0.0) + float(part.sum())
    return found


def picture_map(weights: Float64Array, layer: LayerSpec, own: int, pictures: int = 1) -> Float64Array:
    """Return the attention (K,) on picture tokens as a map.

    Pictures of one kind are put side by side. Maps of different kinds are added, because reference and target show the
    same scene.

    pictures: number of pictures of the cameras, all of one size. A kind with fewer pictures, such as the one target of
        several references, belongs to the first ones; the others get no attention from it.

    Raises:
        CaptureError: the number of tokens does not match the layer's segments.
        RunError: the attention on pictures is zero or not a number.
    """
    kinds: dict[str, list[Float64Array]] = {}
    *parts, _ = split(weights, layer, own)
    for segment, part in zip(layer.segments, parts, strict=True):
        if segment.grid is not None:
            kinds.setdefault(segment.name, []).append(_evened(part.reshape(segment.grid), segment.extent))
    added = combined([_strip(found, pictures) for found in kinds.values()])
    total = float(added.sum())
    if not total > 0:
        raise RunError(f"the attention on the pictures of layer {layer.name} is {total}", "check the policy's weights")
    return added / total


def _evened(values: Float64Array, extent: tuple[float, float] | None) -> Float64Array:
    """Resample a map whose last row and column extend beyond the picture to the same number of cells of equal size."""
    if extent is None:
        return values
    rows, columns = (_overlaps(n, n, whole) for n, whole in zip(values.shape, extent, strict=True))
    result: Float64Array = rows @ values @ columns.T
    return result


def _strip(found: Sequence[Float64Array], pictures: int) -> Float64Array:
    """Put the maps of one kind side by side, with zeros for missing pictures."""
    return np.concatenate([*found, *[np.zeros_like(found[0])] * (pictures - len(found))], axis=1)


def combined(maps: Sequence[Float64Array]) -> Float64Array:
    """Add maps of the same picture on the finest of their grids (most rows, most columns)."""
    rows, columns = zip(*(grid_of(m) for m in maps), strict=True)
    total: Float64Array = np.sum([resampled(m, (max(rows), max(columns))) for m in maps], axis=0)
    return total


def grid_of(values: npt.NDArray[np.generic]) -> Grid:
    """Return the shape (R, C) of a map."""
    rows, columns = values.shape
    return rows, columns


def resampled(values: Float64Array, grid: Grid) -> Float64Array:
    """Resample a map (R, C) to `grid`, keeping its sum: each cell's value is spread evenly over the cell's area."""
    rows, columns = (_overlaps(values.shape[axis], grid[axis]) for axis in (0, 1))
    result: Float64Array = rows @ values @ columns.T
    return result


def differences(now: UInt8Image, target: UInt8Image, grid: Grid) -> Float64Array:
    """Return the mean absolute difference of two pictures (H, W, 3), 0 to 255, in each cell of the grid."""
    pixels = np.abs(now.astype(np.float64) - target.astype(np.float64)).mean(axis=2)
    mean: Float64Array = resampled(pixels, grid) * (grid[0] * grid[1] / pixels.size)
    return mean


def changed(now: UInt8Image, target: UInt8Image, grid: Grid) -> BoolArray:
    """Return which cells of the grid change: as a mask, all False if the pictures are equal.

    A cell changes if its difference is above `CHANGE_FRACTION` of the largest one, so contrast and lighting do not
    matter.
    """
    difference = differences(now, target, grid)
    region: BoolArray = difference > CHANGE_FRACTION * difference.max()
    return region


def lift(values: Float64Array, region: BoolArray) -> float:
    """Return a map's mass on a region divided by the region's share of the area: 1 for a uniform map.

    The region must not be empty.
    """
    return float(values[region].sum() / region.mean())


def lifts(maps: Float64Array, regions: BoolArray) -> Float64Array:
    """Return the `lift` of every map i on every region j, (N, N). maps, regions: (N, R, C); no region is empty."""
    mass = maps.reshape(len(maps), -1) @ regions.reshape(len(regions), -1).T.astype(np.float64)
    result: Float64Array = mass / regions.mean(axis=(1, 2))
    return result


def _overlaps(cells: int, into: int, whole: float | None = None) -> Float64Array:
    """Return (into, cells): the fraction of each of `cells` cells of a line inside each of `into` equal cells.

    whole: length of the line in cells, if the line ends within the last cell; None: `cells`.
    """
    edges, others = np.minimum(np.arange(cells + 1) / (whole or cells), 1.0), np.arange(into + 1) / into
    low = np.maximum(edges[None, :-1], others[:-1, None])
    high = np.minimum(edges[None, 1:], others[1:, None])
    overlap: Float64Array = np.clip(high - low, 0.0, None) / np.diff(edges)
    return overlap

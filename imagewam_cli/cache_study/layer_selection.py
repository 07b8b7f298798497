"""Choose the layers to keep, by how well they predict the actions of a sample of rows.

The predictor is kernel ridge regression from [state, keys and values of the kept layers] to the action chunk, with one
linear kernel per layer, all of equal weight, and is scored on held-out episodes. Backward elimination removes one layer
at a time: the one whose removal leaves the smallest error. Keys and values are reduced to sketches of `_SKETCH` signed
sums (count sketch, Charikar et al. 2002), which preserve inner products on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from imagewam_cli.data.spread import spread_frames, spread_rows
from imagewam_cli.data.types import Dataset, FloatArray
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.building.encoding import batches
from imagewam_cli.kvcache.format.frame_table import FrameTable
from imagewam_cli.prefix.kv import PrefixKV

Float64Array = npt.NDArray[np.float64]

_SKETCH = 1024
_SAMPLE_LIMITS = {"episodes": 48, "rows": 6}
_BATCH = 8
_HORIZON = 10
"""Number of actions in the predicted chunk."""
_FOLDS = 5
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The chosen layers, and how the error grew as others were removed."""

    kept: tuple[int, ...]
    """Indices of the kept layers, ascending."""
    removed: tuple[int, ...]
    """Indices of the removed layers, in order of removal."""
    errors: tuple[float, ...]
    """Mean squared errors over the actions' variance: with all layers, then after each removal."""


class LayerSketches:
    """Collect a sketch per row and layer, so that memory does not grow with the size of a prefix."""

    def __init__(self) -> None:
        self._rows: list[list[npt.NDArray[np.float32]]] = []

    def add(self, prefix: PrefixKV) -> None:
        """Add a batch of prefixes. Padding holds zeros and does not count."""
        for i, kv in enumerate(prefix.layers):
            if len(self._rows) <= i:
                self._rows.append([])
            flat = torch.cat([kv.k.flatten(1), kv.v.flatten(1)], dim=1).float().cpu()
            self._rows[i].append(_sketch(flat, seed=i))

    def kernels(self) -> list[Float64Array]:
        """Return each layer's linear kernel over the rows, (N, N): centered, with a mean diagonal of 1."""
        return [_kernel(np.concatenate(rows)) for rows in self._rows]


def choose_layers(
    kernels: Sequence[Float64Array], state: Float64Array, actions: Float64Array, episodes: Sequence[int], keep: int
) -> LayerChoice:
    """Remove layers one at a time until `keep` are left.

    kernels: (N, N) for each layer. state: (N, S). actions: (N, M), the flattened chunks. episodes: episode of each row.

    Raises:
        UsageError: `keep` is not between 1 and the number of layers, or the rows are from a single episode.
    """
    _require_layers(len(kernels), keep)
    folds = _folds(episodes)
    base, targets = _kernel(state), (actions - actions.mean(0)) / max(float(actions.std()), 1e-12)

    def error(kept: Iterable[int]) -> float:
        chosen = [kernels[i] for i in kept]
        return _error(base + sum(chosen[1:], chosen[0]) / len(chosen), targets, folds)

    kept, removed, errors = list(range(len(kernels))), [], [error(range(len(kernels)))]
    while len(kept) > keep:
        without = {i: error([j for j in kept if j != i]) for i in kept}
        weakest = min(without, key=lambda i: without[i])
        kept.remove(weakest)
        removed.append(weakest)
        errors.append(without[weakest])
    return LayerChoice(kept=tuple(kept), removed=tuple(removed), errors=tuple(errors))


def measure_layers(
    editor: Editor, dataset: Dataset, keep: int, *, stride: int = 1, on_rows: Callable[[int], None] = lambda rows: None
) -> LayerChoice:
    """Choose layers from a few rows of each of a few dozen episodes. editor: the editor with all its layers.

    Raises:
        UsageError: `keep` is out of range, or the dataset has a single episode.
    """
    sampled_episodes = sorted({episode for episode, _ in spread_frames(dataset, **_SAMPLE_LIMITS, stride=stride)})
    _require_layers(len(editor.spec.layers), keep)  # fail before the slow forward passes
    _folds(sampled_episodes)
    table, _ = FrameTable.from_rows(dataset.rows(images=False))
    sketches, rows = LayerSketches(), []
    for few in batches(spread_rows(dataset, **_SAMPLE_LIMITS, stride=stride), _BATCH):
        sketches.add(editor.encode([r.images for r in few], [r.instruction for r in few]))
        rows += [dataclasses.replace(r, images={}) for r in few]
        on_rows(len(few))
    state = np.stack([r.state for r in rows]).astype(np.float64)
    chunks = [table.chunk(r.episode, r.frame, _HORIZON).actions.ravel() for r in rows]
    return choose_layers(
        sketches.kernels(), state, np.stack(chunks).astype(np.float64), [r.episode for r in rows], keep
    )


def sample_rows(dataset: Dataset, stride: int = 1) -> int:
    """Return the number of rows that `measure_layers` encodes."""
    return len(spread_frames(dataset, **_SAMPLE_LIMITS, stride=stride))


def _require_layers(count: int, keep: int) -> None:
    if not 1 <= keep <= count:
        raise UsageError(f"auto:{keep}: the editor has {count} layers", f"choose auto:1 to auto:{count}")


def _sketch(flat: torch.Tensor, seed: int) -> npt.NDArray[np.float32]:
    """Reduce (N, M) to (N, _SKETCH): add each column, with a random sign, to a random sum; the same for every row."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(_SKETCH, (flat.shape[1],), generator=generator)
    signs = torch.randint(2, (flat.shape[1],), generator=generator) * 2.0 - 1.0
    sums = torch.zeros(len(flat), _SKETCH).index_add_(1, columns, flat * signs)
    return sums.numpy()


def _kernel(features: FloatArray) -> Float64Array:
    centered = features.astype(np.float64) - features.mean(0)
    kernel: Float64Array = centered @ centered.T
    return kernel / max(float(np.trace(kernel)) / len(kernel), 1e-12)


def _folds(episodes: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
    """Return a mask of held-out rows for each fold. An episode is held out as a whole."""
    numbers = np.unique(np.asarray(episodes), return_inverse=True)[1]
    count = min(_FOLDS, int(numbers.max()) + 1)
    if count < 2:
        raise UsageError("layers cannot be chosen from a single episode", "name the layers, for example --layers 0,4,9")
    return [numbers % count == fold for fold in range(count)]


def _error(kernel: Float64Array, targets: Float64Array, folds: Sequence[npt.NDArray[np.bool_]]) -> float:
    """Return the mean squared error on held-out rows, with the best ridge."""
    return min(_held_out(kernel, targets, folds, ridge) for ridge in _RIDGES)


def _held_out(
    kernel: Float64Array, targets: Float64Array, folds: Sequence[npt.NDArray[np.bool_]], ridge: float
) -> float:
    squares = []
    for out in folds:
        fitted = kernel[np.ix_(~out, ~out)] + ridge * np.eye(int((~out).sum()))
        mean = targets[~out].mean(0)
        weights = np.linalg.solve(fitted, targets[~out] - mean)
        squares.append(np.square(kernel[np.ix_(out, ~out)] @ weights + mean - targets[out]).mean(1))
    return float(np.concatenate(squares).mean())

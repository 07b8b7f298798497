"""Which layers to keep: those whose removal hurts a predictor of the actions least, measured on a sample of rows.

The predictor is kernel ridge regression from [state, keys and values of the kept layers] to the chunk that follows,
with a linear kernel per layer, all of equal weight; its error is on episodes that it was not fitted to. One after
another, the layer goes without which that error is least (backward elimination). Keys and values enter as sketches of a
few hundred signed sums (count sketch, Charikar et al. 2002), whose inner products are those of the whole, on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from imagewam_cli.data.spread import spread_places, spread_rows
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.building.encoding import batches
from imagewam_cli.kvcache.format.frame_table import FrameTable
from imagewam_cli.prefix.kv import PrefixKV

Float64Array = npt.NDArray[np.float64]

_SKETCH = 1024
_SPREAD = {"episodes": 48, "rows": 6}
_BATCH = 8
_HORIZON = 10
"""Actions of the chunk."""
_FOLDS = 5
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """kept: indices, ascending; errors: of the predictor as layers went, over the spread of the actions, all of them
    first; removed: in the order in which they went."""

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    errors: tuple[float, ...]


class LayerSketches:
    """Collects rows; memory is a sketch a row and layer."""

    def __init__(self) -> None:
        self._rows: list[list[npt.NDArray[np.float32]]] = []

    def add(self, prefix: PrefixKV) -> None:
        """A batch. What is padding holds zeros and adds nothing."""
        for i, kv in enumerate(prefix.layers):
            if len(self._rows) <= i:
                self._rows.append([])
            flat = torch.cat([kv.k.flatten(1), kv.v.flatten(1)], dim=1).float().cpu()
            self._rows[i].append(_sketched(flat, seed=i))

    def kernels(self) -> list[Float64Array]:
        """One for each layer, (N, N): of centred sketches, with a mean of 1 on the diagonal."""
        return [_kernel(np.concatenate(rows)) for rows in self._rows]


def choose_layers(
    kernels: Sequence[Float64Array], state: Float64Array, actions: Float64Array, episodes: Sequence[int], keep: int
) -> LayerChoice:
    """kernels: of the layers; state (N, S), actions (N, M): of the rows, M numbers of the chunk; keep: how many.

    Raises:
        UsageError: `keep` is none of 1 .. the number of layers, or the rows are of a single episode.
    """
    _require_layers(len(kernels), keep)
    folds = _folds(episodes)
    base, targets = _kernel(state.astype(np.float32)), (actions - actions.mean(0)) / max(float(actions.std()), 1e-12)

    def error(kept: Iterable[int]) -> float:
        chosen = [kernels[i] for i in kept]
        return _error(base + sum(chosen[1:], chosen[0]) / len(chosen), targets, folds)

    kept, removed, errors = list(range(len(kernels))), [], [error(range(len(kernels)))]
    while len(kept) > keep:
        without = {i: error([j for j in kept if j != i]) for i in kept}
        gone = min(without, key=lambda i: without[i])
        kept.remove(gone)
        removed.append(gone)
        errors.append(without[gone])
    return LayerChoice(kept=tuple(kept), removed=tuple(removed), errors=tuple(errors))


def measure_layers(
    editor: Editor, dataset: Dataset, keep: int, *, stride: int = 1, on_rows: Callable[[int], None] = lambda rows: None
) -> LayerChoice:
    """On a few rows of each of a few dozen episodes. editor: with all of its layers.

    Raises:
        UsageError: as `choose_layers`.
    """
    shown = sorted({episode for episode, _ in spread_places(dataset, **_SPREAD, stride=stride)})
    _require_layers(len(editor.spec.layers), keep)  # before anything is computed
    _folds(shown)
    table, _ = FrameTable.of(dataset.rows(images=False))
    sketches, rows = LayerSketches(), []
    for few in batches(spread_rows(dataset, **_SPREAD, stride=stride), _BATCH):
        sketches.add(editor.encode([r.images for r in few], [r.instruction for r in few]))
        rows += [dataclasses.replace(r, images={}) for r in few]
        on_rows(len(few))
    state = np.stack([r.state for r in rows]).astype(np.float64)
    chunks = [table.chunk(r.episode, r.frame, _HORIZON).actions.ravel() for r in rows]
    return choose_layers(
        sketches.kernels(), state, np.stack(chunks).astype(np.float64), [r.episode for r in rows], keep
    )


def sample_rows(dataset: Dataset, stride: int = 1) -> int:
    """How many rows `measure_layers` looks at."""
    return len(spread_places(dataset, **_SPREAD, stride=stride))


def _require_layers(count: int, keep: int) -> None:
    if not 1 <= keep <= count:
        raise UsageError(f"auto:{keep}: the editor has {count} layers", f"choose auto:1 to auto:{count}")


def _sketched(flat: torch.Tensor, seed: int) -> npt.NDArray[np.float32]:
    """(N, M) -> (N, sketch): each number goes, with a random sign, to a random sum; the same for every row."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(_SKETCH, (flat.shape[1],), generator=generator)
    signs = torch.randint(2, (flat.shape[1],), generator=generator) * 2.0 - 1.0
    sums = torch.zeros(len(flat), _SKETCH).index_add_(1, places, flat * signs)
    return sums.numpy()


def _kernel(features: npt.NDArray[np.float32]) -> Float64Array:
    centred = features.astype(np.float64) - features.mean(0)
    kernel: Float64Array = centred @ centred.T
    return kernel / max(float(np.trace(kernel)) / len(kernel), 1e-12)


def _folds(episodes: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
    """Which rows each fold holds out: whole episodes."""
    numbers = np.unique(np.asarray(episodes), return_inverse=True)[1]
    count = min(_FOLDS, int(numbers.max()) + 1)
    if count < 2:
        raise UsageError("layers cannot be chosen from a single episode", "name them, as --layers 0,4,9")
    return [numbers % count == fold for fold in range(count)]


def _error(kernel: Float64Array, targets: Float64Array, folds: Sequence[npt.NDArray[np.bool_]]) -> float:
    """Mean squared error on held-out rows, under the ridge that suits best."""
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

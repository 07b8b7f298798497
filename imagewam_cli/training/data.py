"""What the trainer reads: prefixes of rows with the action chunk that follows each, normalised, in a seeded order.

The order of epoch e is a function of (seed, e) alone, so a continued run sees the rows that the interrupted one would
have seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewam_cli.data.normalization import NormalizationMode, Normalizer, RunningStats
from imagewam_cli.data.splits import split_episodes
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.frame_table import Indices
from imagewam_cli.kvcache.reading.epoch_order import epoch_order
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.training.prefixes import PrefixSource
from imagewam_cli.training.recipe import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """state (B, S) and actions (B, T, A) normalised float32; is_pad bool (B, T); prefix of B rows; row: dataset
    rows."""

    prefix: PrefixKV
    state: Tensor
    actions: Tensor
    is_pad: Tensor
    row: Indices


class TimedBatches(Iterator[Batch]):
    """Batches, and how long was waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __next__(self) -> Batch:
        started = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.monotonic() - started


class ExpertData:
    """Training and validation rows of one source under one recipe."""

    def __init__(self, source: PrefixSource, recipe: TrainRecipe) -> None:
        self.source, self.recipe = source, recipe
        episodes = np.unique(source.index.episode).tolist()
        train, validation = split_episodes(episodes, recipe.validation_fraction, recipe.seed)
        self.train_episodes = train[: recipe.episodes]
        self.validation_episodes = validation
        self.train_rows = self._rows(self.train_episodes)
        held_out = self._rows(validation)
        as_recorded = held_out[source.index.variant[held_out] == 0]
        self.validation_rows = _thin(as_recorded, recipe.validation_rows)
        if len(self.train_rows) == 0:
            raise CacheError(f"{source.info.location} leaves no row to train on", "record more episodes")
        table = source.table
        self.action_normalizer = _normalizer(
            [table.actions_of(e) for e in self.train_episodes], recipe.normalize_action
        )
        self.state_normalizer = _normalizer([table.states_of(e) for e in self.train_episodes], recipe.normalize_state)

    @property
    def state_dim(self) -> int:
        """Numbers of a state."""
        return int(self.source.table.state.shape[1])

    @property
    def action_dim(self) -> int:
        """Numbers of an action."""
        return int(self.source.table.action.shape[1])

    def batch(self, indices: Indices) -> Batch:
        """The rows of these numbers."""
        return self._batch(indices, self.source.gather(indices))

    def _batch(self, indices: Indices, prefix: Callable[[], PrefixKV]) -> Batch:
        index, table, horizon = self.source.index, self.source.table, self.recipe.expert.horizon
        episodes, frames = index.episode[indices], index.frame[indices]
        chunks = [table.chunk(int(e), int(f), horizon) for e, f in zip(episodes, frames, strict=True)]
        states = np.stack([table.states_of(int(e))[f] for e, f in zip(episodes, frames, strict=True)])
        actions = self.action_normalizer.normalize(np.stack([c.actions for c in chunks]))
        return Batch(
            prefix=prefix(),
            state=torch.from_numpy(self.state_normalizer.normalize(states)),
            actions=torch.from_numpy(actions),
            is_pad=torch.from_numpy(np.stack([c.is_pad for c in chunks])),
            row=index.row[indices],
        )

    def order(self, first_step: int) -> Iterator[Indices]:
        """Row numbers of each step's batch from `first_step` on, forever; each epoch is one shuffle of all rows."""
        size = min(self.recipe.batch, len(self.train_rows))
        per_epoch = len(self.train_rows) // size
        epoch, skip = divmod(first_step, per_epoch)
        while True:
            order = epoch_order(
                self.train_rows,
                self.source.shard_rows,
                shuffle=self.recipe.shuffle,
                seed=self.recipe.seed,
                epoch=epoch,
            )
            for i in range(skip, per_epoch):
                yield np.sort(order[i * size : (i + 1) * size])
            epoch, skip = epoch + 1, 0

    def rows_needed(self, first_step: int, last_step: int, *, validation: bool = True) -> Indices:
        """Every row that the batches of steps [first_step, last_step) or the validation hold."""
        needed = np.zeros(self.source.info.rows, dtype=np.bool_)
        needed[self.validation_rows] = validation
        for indices in islice(self.order(first_step), last_step - first_step):
            needed[indices] = True
            if needed[self.train_rows].all():
                break
        return np.nonzero(needed)[0].astype(np.int64)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, last_step), the next one read while the current one is used."""
        order = islice(self.order(first_step), last_step - first_step)
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting: tuple[Indices, Future[Callable[[], PrefixKV]]] | None = None
            for indices in order:
                ahead = indices, worker.submit(self.source.gather, indices)
                if waiting is not None:
                    yield self._batch(waiting[0], waiting[1].result())
                waiting = ahead
            if waiting is not None:
                yield self._batch(waiting[0], waiting[1].result())

    def _rows(self, episodes: Sequence[int]) -> Indices:
        return np.nonzero(np.isin(self.source.index.episode, episodes))[0].astype(np.int64)


def _thin(rows: Indices, count: int) -> Indices:
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _normalizer(parts: list[npt.NDArray[np.float32]], mode: NormalizationMode) -> Normalizer:
    stats = RunningStats(parts[0].shape[1])
    for part in parts:
        stats.update(part)
    return Normalizer(mode=mode, stats=stats.result())

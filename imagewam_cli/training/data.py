"""Training and validation batches: prefixes with normalized states and action chunks, in a seeded order.

The order of an epoch depends on (seed, epoch) only, so a resumed run sees the rows that an uninterrupted run would see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.dimensions import FieldName, inherited_faults, training_notes
from imagewam_cli.data.normalization import NormalizationMode, Normalizer, RunningStats
from imagewam_cli.data.splits import Split, split_episodes
from imagewam_cli.data.types import FloatArray
from imagewam_cli.errors import CacheError, warn
from imagewam_cli.kvcache.format.frame_table import Indices, warn_of_copies
from imagewam_cli.kvcache.reading.epoch_order import BatchSchedule
from imagewam_cli.kvcache.reading.row_batch import row_batch
from imagewam_cli.policy.bundle import BundleParts
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.training.prefixes import PrefixSource
from imagewam_cli.training.recipe import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    """state (B, S) and actions (B, T, A) normalized float32; is_pad bool (B, T); prefix of B rows; row: dataset
    rows."""

    prefix: PrefixKV
    state: Tensor
    actions: Tensor
    is_pad: Tensor
    row: Indices


class TimedBatches(Iterator[Batch]):
    """Iterates over batches and measures the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __next__(self) -> Batch:
        started = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.monotonic() - started


class ExpertData:
    """Training and validation rows of one prefix source, as one recipe selects and normalizes them."""

    def __init__(self, source: PrefixSource, recipe: TrainRecipe, split: Split | None = None) -> None:
        """split: the episodes to use; None: those that the recipe implies, see `new_split`."""
        self.source, self.recipe = source, recipe
        self.split = new_split(source, recipe) if split is None else split
        self.train_episodes, self.validation_episodes = self.split.train, self.split.validation
        self.train_rows = self._rows(self.train_episodes)
        held_out = self._rows(self.validation_episodes)
        as_recorded = held_out[source.index.variant[held_out] == 0]
        self.validation_rows = _thin(as_recorded, recipe.validation_rows)
        if len(self.train_rows) == 0:
            raise CacheError(f"{source.info.location} has no row to train on", "record more episodes")
        table = source.table
        warn_of_copies(table, source.info.dataset.state_names, source.info.dataset.action_names)
        self.action_normalizer = _normalizer(
            [table.actions_of(e) for e in self.train_episodes], recipe.normalize_action
        )
        self.state_normalizer = _normalizer([table.states_of(e) for e in self.train_episodes], recipe.normalize_state)

    def keep_normalizers(self, parts: BundleParts) -> None:
        """Use the normalizers of the policy that this run wrote so far: its weights were trained with them."""
        pairs = (
            (self.state_normalizer, parts.state_normalizer),
            (self.action_normalizer, parts.action_normalizer),
        )
        if not all(now.same_map(then) for now, then in pairs):
            warn(
                "this run was begun by an imagewam that normalizes states or actions differently: it goes on with its "
                "own normalizers; start over with --fresh for those of this version"
            )
        self.state_normalizer, self.action_normalizer = parts.state_normalizer, parts.action_normalizer

    def notes(self) -> list[str]:
        """Say which dimensions are constant, and where the clamp or a few rows decide; one line each."""
        table, dataset = self.source.table, self.source.info.dataset
        return [
            *self._notes("state", dataset.state_names, self.state_normalizer, table.states_of),
            *self._notes("action", dataset.action_names, self.action_normalizer, table.actions_of),
        ]

    def _notes(
        self, field: FieldName, names: Sequence[str], normalizer: Normalizer, values_of: Callable[[int], FloatArray]
    ) -> list[str]:
        parts = [values_of(e) for e in self.train_episodes]
        starts = np.cumsum([0, *(len(part) for part in parts)])

        def place(row: int) -> str:
            i = int(np.searchsorted(starts, row, side="right")) - 1
            return f"episode {self.train_episodes[i]}, frame {row - starts[i]}"

        return [
            *inherited_faults(field, names, normalizer),
            *training_notes(field, names, normalizer, np.concatenate(parts), place),
        ]

    @property
    def state_dim(self) -> int:
        """Dimensions of a state."""
        return int(self.source.table.state.shape[1])

    @property
    def action_dim(self) -> int:
        """Dimensions of an action."""
        return int(self.source.table.action.shape[1])

    def batch(self, indices: Indices) -> Batch:
        """Read and assemble the batch of these rows."""
        return self._batch(indices, self.source.begin_read(indices))

    def _batch(self, indices: Indices, prefix: Callable[[], PrefixKV]) -> Batch:
        found = row_batch(self.source.table, self.source.index, indices, self.recipe.expert.horizon)
        return Batch(
            prefix=prefix(),
            state=torch.from_numpy(self.state_normalizer.normalize(found.state)),
            actions=torch.from_numpy(self.action_normalizer.normalize(found.actions)),
            is_pad=torch.from_numpy(found.is_pad),
            row=found.row,
        )

    def order(self, first_step: int) -> Iterator[Indices]:
        """Yield the rows of each step's batch from `first_step` on, without end. An epoch is one pass over all rows;
        rows that do not fill a batch are omitted."""
        schedule = BatchSchedule(
            rows=self.train_rows,
            shard_rows=self.source.shard_rows,
            batch=min(self.recipe.batch, len(self.train_rows)),
            shuffle=self.recipe.shuffle,
            seed=self.recipe.seed,
            remainder="drop",
        )
        return schedule.steps(first_step)

    def rows_needed(self, first_step: int, last_step: int, *, validation: bool = True) -> Indices:
        """Return every row that steps [first_step, last_step) or the validation use, ascending."""
        needed = np.zeros(self.source.info.rows, dtype=np.bool_)
        needed[self.validation_rows] = validation
        for indices in islice(self.order(first_step), last_step - first_step):
            needed[indices] = True
            if needed[self.train_rows].all():
                break
        return np.nonzero(needed)[0].astype(np.int64)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of steps [first_step, last_step); a thread reads the next batch meanwhile."""
        order = islice(self.order(first_step), last_step - first_step)
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting: tuple[Indices, Future[Callable[[], PrefixKV]]] | None = None
            for indices in order:
                ahead = indices, worker.submit(self.source.begin_read, indices)
                if waiting is not None:
                    yield self._batch(waiting[0], waiting[1].result())
                waiting = ahead
            if waiting is not None:
                yield self._batch(waiting[0], waiting[1].result())

    def _rows(self, episodes: Sequence[int]) -> Indices:
        return np.nonzero(np.isin(self.source.index.episode, episodes))[0].astype(np.int64)


def new_split(source: PrefixSource, recipe: TrainRecipe) -> Split:
    """Split the episodes of a new run. Validation spares the only episode of an instruction if it can."""
    train, validation = split_episodes(
        _episodes(source), recipe.validation_fraction, recipe.seed, _instructions_of(source)
    )
    return Split(train=train[: recipe.episodes], validation=validation)


def older_split(source: PrefixSource, recipe: TrainRecipe) -> Split:
    """Split the episodes of a run that an older imagewam began, which did not record the split."""
    train, validation = split_episodes(_episodes(source), recipe.validation_fraction, recipe.seed)
    return Split(train=train[: recipe.episodes], validation=validation)


def warn_of_split(source: PrefixSource, recipe: TrainRecipe, split: Split) -> None:
    """Warn if the training lacks instructions of the dataset, or has fewer episodes than the recipe says."""
    tasks, count, names = _instructions_of(source), len(_episodes(source)), source.info.instructions
    every, trained = _union(tasks, tasks), _union(tasks, split.train)
    only = every - _union(tasks, tasks.keys() - set(split.validation))
    if only:
        number = next(e for e in split.validation if tasks[e] & only)
        found = ", ".join(repr(names[task]) for task in sorted(tasks[number] & only))
        warn(
            f"validation takes the only episode of {len(only)} of the {len(every)} instructions, such as episode "
            f"{number} ({found}), so they are not trained on; set validation_fraction to 0 to train on all"
        )
    if lost := every - trained - only:
        warn(
            f"the recipe's first {len(split.train)} training episodes have {len(trained)} of the {len(every)} "
            f"instructions, and not {names[min(lost)]!r}; raise or omit the key episodes"
        )
    asked = max(1, round(count * recipe.validation_fraction)) if recipe.validation_fraction else 0
    if 0 < len(split.validation) < min(asked, count - 1):
        warn(
            f"{len(split.validation)} of {count} episodes are held out for validation, fewer than validation_fraction "
            f"{recipe.validation_fraction:g} asks for: the others are the only ones of their instruction"
        )
    if recipe.episodes is not None and recipe.episodes > len(split.train):
        warn(f"the recipe asks for {recipe.episodes} training episodes, but there are only {len(split.train)}")


def _episodes(source: PrefixSource) -> list[int]:
    found: list[int] = np.unique(source.index.episode).tolist()
    return found


def _instructions_of(source: PrefixSource) -> dict[int, set[int]]:
    """Return the instructions of each episode's rows, as indices into `SourceInfo.instructions`."""
    pairs = np.unique(np.stack([source.index.episode, source.index.instruction], axis=1), axis=0)
    found: dict[int, set[int]] = {}
    for episode, instruction in pairs.tolist():
        found.setdefault(episode, set()).add(instruction)
    return found


def _union(tasks: Mapping[int, set[int]], episodes: Iterable[int]) -> set[int]:
    return {task for episode in episodes for task in tasks[episode]}


def _thin(rows: Indices, count: int) -> Indices:
    """Return at most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _normalizer(parts: list[FloatArray], mode: NormalizationMode) -> Normalizer:
    stats = RunningStats(parts[0].shape[1])
    for part in parts:
        stats.update(part)
    return Normalizer(mode=mode, stats=stats.result())

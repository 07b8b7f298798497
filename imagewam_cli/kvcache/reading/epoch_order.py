"""Decide the order in which an epoch's rows are read, from (seed, epoch) and, in distributed training, the rank.

`epoch_order` orders the rows. `BatchSchedule` divides each epoch into batches; the trainer and `BatchOrder` both use
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imagewam_cli.kvcache.format.frame_table import Indices

Shuffle = Literal["rows", "shards", "none"]
"""rows: every order of the rows is equally likely. shards: shuffle a few shards at a time, for caches larger than
memory. none: keep the stored order."""

Remainder = Literal["pad", "drop", "uneven"]
"""Treatment of rows that do not divide among the ranks. pad: repeat the first rows. drop: omit rows. uneven: give some
ranks one row more."""

_SHARDS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Batches of every epoch, for one rank. Each batch is determined by its epoch and its number."""

    rows: Indices
    """Rows to read, ascending."""
    shard_rows: Sequence[int]
    """Number of rows in each shard."""
    batch: int
    """Rows per batch. The last batch of an epoch may have fewer; with `drop` it is omitted."""
    shuffle: Shuffle
    seed: int
    shuffle_rows: int | None = None
    """Number of rows that `shards` shuffles together; by default as many as four shards have on average."""
    rank: int = 0
    world_size: int = 1
    remainder: Remainder = "pad"

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in each epoch."""
        first, last = rank_range(len(self.rows), self.rank, self.world_size, self.remainder)
        rows = last - first
        return rows // self.batch if self.remainder == "drop" else -(-rows // self.batch)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Indices]:
        """Yield the rows of each batch of an epoch, from batch `first_batch` on."""
        order = epoch_order(
            self.rows,
            self.shard_rows,
            shuffle=self.shuffle,
            shuffle_rows=self.shuffle_rows,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            remainder=self.remainder,
        )
        for i in range(first_batch, self.batches_per_epoch):
            # ascending within the batch, so that files are read from front to back
            yield np.sort(order[i * self.batch : (i + 1) * self.batch])

    def steps(self, first_step: int = 0) -> Iterator[Indices]:
        """Yield the rows of each training step, epoch after epoch, without end."""
        epoch, first_batch = divmod(first_step, self.batches_per_epoch)
        while True:
            yield from self.epoch(epoch, first_batch)
            epoch, first_batch = epoch + 1, 0


def epoch_order(
    rows: Indices,
    shard_rows: Sequence[int],
    *,
    shuffle: Shuffle,
    seed: int,
    epoch: int,
    shuffle_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    remainder: Remainder = "pad",
) -> Indices:
    """Return the rows that rank `rank` of `world_size` reads in an epoch, in order.

    With `shards`, the shards are put in a random order and their rows one after another; each rank takes a contiguous
    range, and within it every `shuffle_rows` rows are shuffled. So a rank reads few shards at a time, and each once.

    Args:
        rows: rows to read, ascending.
        shard_rows: number of rows in each shard.
        shuffle_rows: by default as many rows as four shards have on average.
    """
    random = np.random.default_rng([seed, epoch])
    if shuffle == "none":
        return _of_rank(rows, rank, world_size, remainder)
    if shuffle == "rows":
        return _of_rank(random.permutation(rows), rank, world_size, remainder)
    window = shuffle_rows if shuffle_rows is not None else _shards_at_once(len(rows), len(shard_rows))
    own = _of_rank(_by_shards(rows, shard_rows, random), rank, world_size, remainder)
    own_random = np.random.default_rng([seed, epoch, rank])
    windows = [own_random.permutation(own[i : i + window]) for i in range(0, len(own), window)]
    return np.concatenate([own[:0], *windows])


def _shards_at_once(rows: int, shards: int) -> int:
    return max(1, -(-rows * _SHARDS_AT_ONCE // shards))


def _by_shards(rows: Indices, shard_rows: Sequence[int], random: np.random.Generator) -> Indices:
    """Return the rows shard by shard, with the shards in a random order."""
    ends = np.searchsorted(rows, np.cumsum(shard_rows))
    parts = np.split(rows, ends[:-1])
    return np.concatenate([parts[i] for i in random.permutation(len(parts))])


def rank_range(count: int, rank: int, world_size: int, remainder: Remainder) -> tuple[int, int]:
    """Return the range [first, last) of an order of `count` rows that a rank reads.

    With `pad`, `last` may exceed `count`: the order then starts over from its first row.
    """
    total = {"pad": -(-count // world_size) * world_size, "drop": count - count % world_size, "uneven": count}
    first, last = (total[remainder] * i // world_size for i in (rank, rank + 1))
    return first, last


def _of_rank(order: Indices, rank: int, world_size: int, remainder: Remainder) -> Indices:
    return order[np.arange(*rank_range(len(order), rank, world_size, remainder)) % max(1, len(order))]

"""In which order the rows of an epoch are read: a function of (seed, epoch), and for many processes of the rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from imagewam_cli.kvcache.format.frame_table import Indices

Shuffle = Literal["rows", "shards", "none"]
"""rows: every order of the rows is equally likely. shards: a few shards at a time, for caches larger than memory. none:
as they are stored."""

Remainder = Literal["pad", "drop", "uneven"]
"""Of rows that do not divide among the processes. pad: the first ones once more. drop: left out. uneven: some processes
have one more."""

_SHARDS_AT_ONCE = 4


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
    """What process `rank` of `world_size` reads of `rows` (ascending numbers) in an epoch, in this order.

    With `shards`, the shards come in a random order; of their rows, one after the other, each process has a stretch,
    and within a stretch every `shuffle_rows` rows are shuffled. So a process reads few shards at a time, and each of
    them once. shard_rows: of each shard. shuffle_rows: by default as many rows as four shards have on average.
    """
    random = np.random.default_rng([seed, epoch])
    if shuffle == "none":
        return _share(rows, rank, world_size, remainder)
    if shuffle == "rows":
        return _share(random.permutation(rows), rank, world_size, remainder)
    window = shuffle_rows if shuffle_rows is not None else _shards_at_once(len(rows), len(shard_rows))
    own = _share(_by_shards(rows, shard_rows, random), rank, world_size, remainder)
    own_random = np.random.default_rng([seed, epoch, rank])
    windows = [own_random.permutation(own[i : i + window]) for i in range(0, len(own), window)]
    return np.concatenate([own[:0], *windows])


def _shards_at_once(rows: int, shards: int) -> int:
    return max(1, -(-rows * _SHARDS_AT_ONCE // shards))


def _by_shards(rows: Indices, shard_rows: Sequence[int], random: np.random.Generator) -> Indices:
    """The rows, shard by shard, the shards in a random order."""
    ends = np.searchsorted(rows, np.cumsum(shard_rows))
    parts = np.split(rows, ends[:-1])
    return np.concatenate([parts[i] for i in random.permutation(len(parts))])


def stretch(count: int, rank: int, world_size: int, remainder: Remainder) -> tuple[int, int]:
    """[first, last) of `count` rows in a row that are the rank's; behind the last comes the first again."""
    total = {"pad": -(-count // world_size) * world_size, "drop": count - count % world_size, "uneven": count}
    first, last = (total[remainder] * i // world_size for i in (rank, rank + 1))
    return first, last


def _share(order: Indices, rank: int, world_size: int, remainder: Remainder) -> Indices:
    return order[np.arange(*stretch(len(order), rank, world_size, remainder)) % max(1, len(order))]

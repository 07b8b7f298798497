"""Test `kvcache.reading.epoch_order`: every row once per epoch, in an order that seed, epoch and rank determine."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from imagewam_cli.kvcache.reading.epoch_order import epoch_order, rank_range

SHARDS = (7, 11, 5, 9, 1, 13, 8, 10)
ROWS = np.arange(sum(SHARDS))
SHARD_OF = np.repeat(np.arange(len(SHARDS)), SHARDS)


def order(rank: int = 0, world_size: int = 1, **given: Any) -> list[int]:
    asked = {"shuffle": "rows", "seed": 0, "epoch": 0} | given
    rows = asked.pop("rows", ROWS)
    found: list[int] = epoch_order(rows, SHARDS, rank=rank, world_size=world_size, **asked).tolist()
    return found


@pytest.mark.parametrize("shuffle", ["rows", "shards", "none"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 64, 100])
class TestShares:
    def test_uneven_ranks_have_every_row_exactly_once(self, shuffle: str, world_size: int) -> None:
        parts = [order(r, world_size, shuffle=shuffle, remainder="uneven") for r in range(world_size)]
        assert sorted([*chain(*parts)]) == ROWS.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_padded_ranks_have_equal_lengths_and_cover_every_row(self, shuffle: str, world_size: int) -> None:
        parts = [order(r, world_size, shuffle=shuffle, remainder="pad") for r in range(world_size)]
        assert {len(part) for part in parts} == {-(-len(ROWS) // world_size)}
        read = [*chain(*parts)]
        assert set(read) == set(ROWS.tolist())
        assert len(read) - len(ROWS) < world_size

    def test_fewer_rows_than_ranks_are_dropped_and_none_is_repeated(self, shuffle: str, world_size: int) -> None:
        parts = [order(r, world_size, shuffle=shuffle, remainder="drop") for r in range(world_size)]
        assert {len(part) for part in parts} == {len(ROWS) // world_size}
        read = [*chain(*parts)]
        assert len(set(read)) == len(read)

    def test_a_rank_range_is_as_long_as_the_ranks_order(self, shuffle: str, world_size: int) -> None:
        for remainder in ("pad", "drop", "uneven"):
            first, last = rank_range(len(ROWS), world_size - 1, world_size, remainder)  # type: ignore[arg-type]
            assert last - first == len(order(world_size - 1, world_size, shuffle=shuffle, remainder=remainder))


@pytest.mark.parametrize("shuffle", ["rows", "shards"])
def test_the_order_depends_only_on_seed_epoch_and_rank(shuffle: str) -> None:
    assert order(shuffle=shuffle) == order(shuffle=shuffle)
    others = [order(shuffle=shuffle, seed=1), order(shuffle=shuffle, epoch=1)]
    assert order(shuffle=shuffle) not in others
    assert others[0] != others[1]


def test_one_rank_over_all_rows_has_numpys_permutation() -> None:
    assert order(seed=3, epoch=4) == np.random.default_rng([3, 4]).permutation(ROWS).tolist()


def test_every_window_holds_whole_shards_except_at_its_ends() -> None:
    window = 20
    read = order(shuffle="shards", shuffle_rows=window)
    assert read != sorted(read)
    for start in range(0, len(read), window):
        inside, rest = set(read[start : start + window]), read[:start] + read[start + window :]
        shared = set(SHARD_OF[list(inside)]) & set(SHARD_OF[rest])
        assert len(shared) <= 2, "two windows share more shards than those cut by the ends"
    assert any(np.diff(SHARD_OF[read[:window]]).tolist()), "the rows of the shards are not mixed"


def test_shards_come_in_another_order_each_epoch() -> None:
    def shards(epoch: int) -> list[int]:
        return list(dict.fromkeys(SHARD_OF[order(shuffle="shards", shuffle_rows=1, epoch=epoch)].tolist()))

    assert sorted(shards(0)) == sorted(shards(1)) == list(range(len(SHARDS)))
    assert shards(0) != shards(1)


def test_by_default_a_window_is_four_mean_shards() -> None:
    assert order(shuffle="shards") == order(shuffle="shards", shuffle_rows=4 * len(ROWS) // len(SHARDS))
    assert order(shuffle="shards") != order(shuffle="shards", shuffle_rows=16)


def test_some_rows_of_the_cache_are_ordered_shard_by_shard() -> None:
    some = ROWS[3::4]
    read = order(rows=some, shuffle="shards", shuffle_rows=1)
    assert sorted(read) == some.tolist()
    assert len(list(dict.fromkeys(SHARD_OF[read].tolist()))) == 1 + np.count_nonzero(np.diff(SHARD_OF[read]))


def test_an_order_without_rows_is_empty() -> None:
    for shuffle in ("rows", "shards", "none"):
        assert order(rows=ROWS[:0], shuffle=shuffle) == []

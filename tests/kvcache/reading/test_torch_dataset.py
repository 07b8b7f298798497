"""Test `kvcache.reading.torch_dataset` with torch's DataLoader: forked and spawned workers, ranks, epochs, batches."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.reading.torch_dataset import BatchOrder, PrefixDataset
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import MemoryDataset
from tests.support.paths import DOCS
from tests.support.stores import Store

ROWS, HORIZON = 15, 3


@pytest.fixture
def cached(built: Path) -> PrefixDataset:
    return PrefixDataset(built, horizon=HORIZON)


def loader(dataset: PrefixDataset, order: BatchOrder, **given: Any) -> DataLoader[Any]:
    return DataLoader(dataset, sampler=order, batch_size=None, **given)  # type: ignore[arg-type]


def rows_of(batches: Iterator[Any] | DataLoader[Any]) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def test_a_batch_equals_the_reader_and_the_dataset(cached: PrefixDataset, built: Path) -> None:
    rows = np.array([9, 2, 14])
    batch, prefix = cached[rows], CacheReader(built).read(rows)
    decoded = cached.decode(batch)
    for there, here in zip(prefix.layers, decoded.layers, strict=True):
        assert torch.equal(there.k, here.k)
        assert torch.equal(there.v, here.v)
    assert prefix.valid is not None
    assert decoded.valid is not None
    assert torch.equal(prefix.valid, decoded.valid)
    frames = list(MemoryDataset(LENGTHS).rows())
    taken = [frame for frame in frames if frame.frame % SETTINGS.stride == 0]
    for i, row in enumerate(rows):
        frame = taken[row]
        assert batch["row"][i] == frame.row
        np.testing.assert_array_equal(batch["state"][i], frame.state)
        rest = [f.action for f in frames if f.episode == frame.episode and f.frame >= frame.frame][:HORIZON]
        np.testing.assert_array_equal(batch["actions"][i, : len(rest)], rest)
        assert batch["is_pad"][i].tolist() == [j >= len(rest) for j in range(HORIZON)]


@pytest.mark.parametrize(("workers", "start"), [(2, "fork"), (1, "spawn")])
def test_workers_change_neither_order_nor_content(cached: PrefixDataset, workers: int, start: str) -> None:
    order = BatchOrder(cached, batch=4, seed=1)
    alone = list(loader(cached, order))
    shared = list(loader(cached, order, num_workers=workers, multiprocessing_context=start))
    assert rows_of(iter(alone)) == rows_of(iter(shared))
    for one, two in zip(alone, shared, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_workers_of_a_cache_in_a_store_open_their_own_connection(built: Path, s3: Store) -> None:
    """Forked workers must not use the store client of their parent process."""
    s3.fs.put(str(built), s3.root, recursive=True)
    stored, cached = PrefixDataset(f"{s3.url}/"), PrefixDataset(built)
    order = BatchOrder(stored, batch=4)
    stored.reader.read(np.array([0]))  # one shard and the client are open now, the workers fetch the other shards
    found = list(loader(stored, order, num_workers=2, multiprocessing_context="fork"))
    for batch, rows in zip(found, order, strict=True):
        expected = cached[rows]
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_fork_while_a_thread_reads_does_not_deadlock(built: Path) -> None:
    reader = CacheReader(built)
    with reader._opening:  # a thread that opens a shard holds this lock
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            reader.read(np.arange(ROWS))
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_cache_is_opened_by_folder_or_url(built: Path, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.fs.put(str(built), memory.root, recursive=True)
    monkeypatch.setenv("HOME", str(built.parent))
    for address in (str(built), f"~/{built.name}", built.as_uri(), memory.url):
        assert len(PrefixDataset(address)) == ROWS


def test_a_new_epoch_reaches_persistent_workers(cached: PrefixDataset) -> None:
    order = BatchOrder(cached, batch=4)
    staying = loader(cached, order, num_workers=1, multiprocessing_context="fork", persistent_workers=True)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(rows_of(staying))
    assert len({str(epoch) for epoch in epochs}) == 3
    order.set_epoch(1)
    assert rows_of(loader(cached, order)) == epochs[1]


@pytest.mark.parametrize("shuffle", ["rows", "shards", "none"])
def test_ranks_read_each_row_exactly_once(cached: PrefixDataset, shuffle: Any) -> None:
    numbers: list[int] = []
    for rank in range(4):
        order = BatchOrder(cached, batch=2, shuffle=shuffle, rank=rank, world_size=4, remainder="uneven")
        numbers += [n for rows in order for n in rows.tolist()]
        assert len(order) == len(list(order))
    assert sorted(numbers) == list(range(ROWS))


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_ranks_have_equally_many_batches(cached: PrefixDataset, remainder: Any) -> None:
    orders = [BatchOrder(cached, batch=2, rank=r, world_size=4, remainder=remainder) for r in range(4)]
    sizes = [[len(rows) for rows in order] for order in orders]
    # Padding repeats one of the 15 rows, so each rank has 4. Dropping leaves 3, one batch of 2.
    assert sizes == [[2, 2] if remainder == "pad" else [2]] * 4
    assert [len(order) for order in orders] == [len(s) for s in sizes]


def test_the_default_rank_is_that_of_torch_distributed(cached: PrefixDataset) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        found = BatchOrder(cached, batch=4)
    finally:
        torch.distributed.destroy_process_group()
    expected = BatchOrder(cached, batch=4, rank=2, world_size=3)
    assert [r.tolist() for r in found] == [r.tolist() for r in expected]
    assert (found.rank, found.world_size) == (2, 3)


def test_an_interrupted_epoch_resumes_at_its_batch(cached: PrefixDataset) -> None:
    order = BatchOrder(cached, batch=4, shuffle="shards")
    order.set_epoch(5)
    whole = [rows.tolist() for rows in order]
    order.set_epoch(5, first_batch=3)
    assert len(order) == 1
    assert [rows.tolist() for rows in order] == whole[3:]


def test_an_order_can_be_limited_to_some_rows(cached: PrefixDataset) -> None:
    order = BatchOrder(cached, batch=2, rows=np.array([14, 3, 7]))
    assert sorted(n for rows in order for n in rows.tolist()) == [3, 7, 14]


def test_a_pickled_reader_has_no_open_files(built: Path) -> None:
    reader = CacheReader(built, "read", open_shards=3)
    reader.read(np.arange(ROWS))
    again = pickle.loads(pickle.dumps(reader))
    assert (again.method, again._most_open, len(again._open)) == ("read", 3, 0)
    assert torch.equal(again.read(np.arange(4)).layers[0].k, reader.read(np.arange(4)).layers[0].k)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "must be at least 1"),
        ({"shuffle_rows": 0}, "must be at least 1"),
        ({"rank": 1}, "belong together"),
        ({"rank": 2, "world_size": 2}, "no rank 2 of 2"),
    ],
)
def test_invalid_numbers_are_usage_errors(cached: PrefixDataset, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BatchOrder(cached, **{"batch": 1} | given)


def test_rows_out_of_range_are_refused(cached: PrefixDataset, built: Path) -> None:
    with pytest.raises(IndexError):
        BatchOrder(cached, batch=1, rows=np.array([0, ROWS]))
    with pytest.raises(UsageError, match="horizon must be at least 1, got 0"):
        PrefixDataset(built, horizon=0)


def test_the_documented_loop_runs(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "guide" / "your-own-loop.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "mine").symlink_to(built)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["epoch"] == 1
    assert len(names["prefix"].layers) == 2
    assert names["prefix"].layers[0].k.dtype == torch.float32
    assert names["actions"].shape == (ROWS, 10, 3)

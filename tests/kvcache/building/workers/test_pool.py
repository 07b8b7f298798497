"""Test how shards are assigned, and reassigned after a worker's death. Workers are threads here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from imagewam_cli.errors import CacheError, ImagewamWarning, warn
from imagewam_cli.kvcache.building.workers.pool import (
    Event,
    ShardFinished,
    WorkerDied,
    WorkerIdle,
    WorkerPool,
    WorkerReady,
)
from imagewam_cli.kvcache.building.workers.worker import Job, Worker
from imagewam_cli.kvcache.storage.manifests import read_manifest
from tests.support.arithmetic_cache import CUT, LENGTHS
from tests.support.arithmetic_editor import MemoryDataset
from tests.support.faults import stop_after
from tests.support.folders import files
from tests.support.worker_jobs import Build, Lost, complain, lose


class ThreadWorkers:
    """Workers as threads of this process, with the interface of the other engines."""

    def __init__(self, job: Job, count: int) -> None:
        self.count, self._job = count, job
        self._events: SimpleQueue[Event | BaseException] = SimpleQueue()
        self._work: dict[int, SimpleQueue[Sequence[str]]] = {}
        self.given: list[tuple[str, ...]] = []
        self.stops = 0

    def start(self, slot: int) -> None:
        work = self._work[slot] = SimpleQueue()
        threading.Thread(target=self._live, args=(slot, work), daemon=True).start()

    def give(self, slot: int, names: Sequence[str]) -> None:
        self.given.append(tuple(names))
        self._work[slot].put(names)

    def wait(self) -> Event:
        event = self._events.get(timeout=10)
        if isinstance(event, BaseException):
            raise event
        return event

    def stop(self) -> None:
        self.stops += 1

    def _live(self, slot: int, work: SimpleQueue[Sequence[str]]) -> None:
        try:
            worker = Worker(self._job, slot, 1)
            self._events.put(WorkerReady(slot, worker.facts))
            while True:
                worker.make(work.get(), lambda entry: self._events.put(ShardFinished(slot, entry)))
                self._events.put(WorkerIdle(slot))
        except Lost:
            self._events.put(WorkerDied(slot, "was lost"))
        except Exception as error:  # noqa: BLE001 - a real worker sends any error to its parent process
            self._events.put(error)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_number_of_workers_gives_the_bytes_of_a_single_build(
    built: Path, tmp_path: Path, job: Any, build_by: Build, count: int
) -> None:
    counted: list[int] = []
    workers = ThreadWorkers(job(), count)
    manifest = build_by(workers, on_rows=counted.append)
    assert files(tmp_path / "cache") == files(built)
    assert sum(counted) == manifest.rows == 15
    assert workers.stops


def test_assignments_shrink_from_long_runs_to_single_shards(job: Any, tmp_path: Path) -> None:
    workers = ThreadWorkers(job(), 2)
    pool = WorkerPool(workers, out=tmp_path, identity="")
    pool._waiting = [str(i) for i in range(40)]
    pool._workers.give = lambda slot, names: workers.given.append(names)
    while pool._waiting:
        pool._free.append(0)
        pool._hand_out()
    lengths = [len(names) for names in workers.given]
    assert lengths[:3] == [10, 7, 5]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-3:] == [1, 1, 1]
    assert [name for names in workers.given for name in names] == [str(i) for i in range(40)]


def test_a_warning_from_loading_reaches_the_main_process(job: Any, build_by: Build) -> None:
    class Warns:
        def open(self, slot: int) -> Any:
            warn("the end is lost")
            return job().open(slot)

    with pytest.warns(ImagewamWarning, match="the end is lost"):
        build_by(ThreadWorkers(Warns(), 1))


@pytest.mark.parametrize("episode", [0, 1, 3, 4])
def test_shards_of_a_lost_worker_are_built_again(
    built: Path, tmp_path: Path, job: Any, build_by: Build, episode: int
) -> None:
    news: list[str] = []
    build_by(ThreadWorkers(job(episode=episode, times=2, happens=lose), 2), on_news=news.append)
    assert files(tmp_path / "cache") == files(built)
    (shard,) = [i for i, episodes in enumerate(CUT) if episode in episodes]
    assert len(news) == 2
    assert all(f"was lost at shard-{shard:05d}.safetensors" in line for line in news)


def test_a_shard_that_kills_every_worker_stops_the_build_which_can_resume(
    built: Path, tmp_path: Path, job: Any, build_by: Build
) -> None:
    with pytest.raises(
        CacheError, match=r"3 workers died at shard-00001\.safetensors; the last one, worker \d, was lost"
    ) as error:
        build_by(ThreadWorkers(job(times=3, happens=lose), 1))
    assert error.value.hint is not None
    assert "--workers" in error.value.hint
    assert not [name for name in files(tmp_path / "cache") if name.endswith((".partial", ".lock"))]
    build_by(ThreadWorkers(job(), 1))
    assert files(tmp_path / "cache") == files(built)


def test_an_editors_error_stops_the_build_with_its_message(tmp_path: Path, job: Any, build_by: Build) -> None:
    workers = ThreadWorkers(job(times=1, happens=complain), 1)
    with pytest.raises(CacheError, match="out of ink") as error:
        build_by(workers)
    assert error.value.hint == "buy some"
    assert workers.stops
    assert read_manifest(tmp_path / "cache").rows == 3


def test_a_worker_that_cannot_start_stops_the_build(job: Any, build_by: Build) -> None:
    class Unloadable:
        def open(self, slot: int) -> Any:
            raise Lost

    with pytest.raises(CacheError, match="3 workers died at the start of worker 0"):
        build_by(ThreadWorkers(Unloadable(), 1))


@pytest.mark.parametrize("strangers", [(0,), (1,)])
def test_workers_with_different_editors_are_refused(job: Any, strangers: tuple[int, ...], tmp_path: Path) -> None:
    differing = job(strangers=strangers)
    identity = MemoryDataset(LENGTHS).info.identity
    with (
        pytest.raises(CacheError, match=r"worker \d differs in its editor"),
        WorkerPool(ThreadWorkers(differing, 2), out=tmp_path, identity=identity) as pool,
    ):
        pool._advance()


def test_a_worker_that_sees_another_dataset_is_refused(job: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(CacheError, match="worker 0 differs in its dataset"),
        WorkerPool(ThreadWorkers(job(), 1), out=tmp_path, identity="another"),
    ):
        pass


def test_ctrl_c_keeps_the_finished_shards(built: Path, tmp_path: Path, job: Any, build_by: Build) -> None:
    workers = ThreadWorkers(job(), 1)
    with pytest.raises(KeyboardInterrupt):
        build_by(workers, on_rows=stop_after(3))
    assert workers.stops
    assert read_manifest(tmp_path / "cache").rows == 3
    build_by(ThreadWorkers(job(), 1))
    assert files(tmp_path / "cache") == files(built)

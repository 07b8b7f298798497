"""Who makes which shard: runs of neighbouring shards for workers that are free, and again what a dead one leaves."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from imagewam_cli.errors import CacheError
from imagewam_cli.files import partial_of
from imagewam_cli.kvcache.building.workers.worker import WorkerFacts
from imagewam_cli.kvcache.format.manifest import ShardEntry
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import storage_at
from imagewam_cli.prefix.spec import KVSpec

ATTEMPTS = 3
"""Workers that may die of one shard, or of loading the editor, before the build stops."""


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its editor."""

    slot: int
    facts: WorkerFacts


@dataclass(frozen=True)
class Finished:
    """A shard is durable."""

    slot: int
    entry: ShardEntry


@dataclass(frozen=True)
class Free:
    """A worker has made all that it was given."""

    slot: int


@dataclass(frozen=True)
class Died:
    """A worker is no more. how: as in "worker 1 was killed"."""

    slot: int
    how: str


Event = Ready | Finished | Free | Died


class Workers(Protocol):
    """A way to run workers: what an engine is. Each has a slot, 0 to `count` - 1."""

    count: int

    def start(self, slot: int) -> None:
        """Start a worker in this slot, in place of a dead one too; `Ready` follows."""
        ...

    def give(self, slot: int, names: Sequence[str]) -> None:
        """Shards for a free worker; `Finished` follows for each, then `Free`."""
        ...

    def wait(self) -> Event:
        """The next event; raises what a worker raised."""
        ...

    def stop(self) -> None:
        """End all workers at once and wait until they have ended. To do it twice is harmless."""
        ...


class WorkerPool:
    """A `ShardProducer` that hands shards to workers. Use it in `with`: workers start on entry and end on exit."""

    def __init__(
        self, workers: Workers, *, out: Location, identity: str, on_news: Callable[[str], None] = lambda line: None
    ) -> None:
        """identity: of the dataset that they are to read; on_news: told in a line when a worker is replaced."""
        self._workers, self._storage = workers, storage_at(out)
        self._identity, self._on_news = identity, on_news
        self._facts: WorkerFacts | None = None
        self._order: dict[str, int] = {}
        self._waiting: list[str] = []
        self._given: dict[int, list[str]] = {}
        self._free: collections.deque[int] = collections.deque()
        self._deaths: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        try:
            for slot in range(self._workers.count):
                self._workers.start(slot)
            while self._facts is None:
                self._advance()
        except BaseException:
            self._workers.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.stop()

    @property
    def spec(self) -> KVSpec:
        return self._known.spec

    def fingerprint(self) -> Mapping[str, Any]:
        return self._known.fingerprint

    @property
    def _known(self) -> WorkerFacts:
        if self._facts is None:
            raise RuntimeError("use a worker pool inside `with`")
        return self._facts

    def make(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        *,
        on_finished: Callable[[ShardEntry], None],
        on_rows: Callable[[int], None],
    ) -> None:
        """As `ShardProducer.make`; workers read the instructions from the dataset themselves.

        Raises:
            CacheError: a worker computes with another editor or dataset, or workers die of a shard `ATTEMPTS` times.
        """
        self._order = {name: i for i, name in enumerate(names)}
        self._waiting, unfinished = list(names), set(names)
        try:
            self._hand_out()
            while unfinished:
                entry = self._advance()
                if entry is not None:
                    on_finished(entry)
                    unfinished.remove(entry.file)
                    on_rows(entry.rows)
                self._hand_out()
        except BaseException:
            self._workers.stop()
            for name in unfinished:
                partial_of(self._storage.draft(name)).unlink(missing_ok=True)
            raise

    def _hand_out(self) -> None:
        """Long runs first, since a run is one stream of pictures; short ones last, so that all end together."""
        while self._free and self._waiting:
            run = max(1, len(self._waiting) // (2 * self._workers.count))
            slot, names = self._free.popleft(), self._waiting[:run]
            self._given[slot], self._waiting = names, self._waiting[run:]
            self._workers.give(slot, tuple(names))

    def _advance(self) -> ShardEntry | None:
        """Wait for one event; the shard that it finishes, if it does."""
        event = self._workers.wait()
        match event:
            case Ready():
                self._require_same(event.facts, event.slot)
                self._deaths.pop(_loading(event.slot), None)
                self._free.append(event.slot)
            case Finished():
                self._given[event.slot].remove(event.entry.file)
                return event.entry
            case Free():
                self._given.pop(event.slot)
                self._free.append(event.slot)
            case Died():
                self._replace(event)
        return None

    def _require_same(self, facts: WorkerFacts, slot: int) -> None:
        first = self._facts or facts
        expected = Provenance(dataset=self._identity, fingerprint=first.fingerprint, spec=first.spec)
        here = Provenance(dataset=facts.dataset, fingerprint=facts.fingerprint, spec=facts.spec)
        for found in expected.differences(here):
            raise CacheError(
                f"worker {slot} computes with another {found.what}: {found.here}, not {found.there}",
                "install the same versions and show the same files everywhere",
            )
        self._facts = first

    def _replace(self, death: Died) -> None:
        """Start another worker for a dead one; what it was at is done again, unless that is what kills."""
        if death.slot in self._free:
            self._free.remove(death.slot)
        left = self._given.pop(death.slot, [])
        cause = left[0] if left else _loading(death.slot)
        self._deaths[cause] += 1
        if self._deaths[cause] >= ATTEMPTS:
            raise CacheError(
                f"worker {death.slot} {death.how} at {cause}, and so did {ATTEMPTS - 1} before it",
                "where memory is full, fewer --workers or a smaller --batch need less; the same command goes on",
            )
        self._on_news(f"worker {death.slot} {death.how} at {cause}: another takes its place")
        self._waiting = sorted([*self._waiting, *left], key=self._order.__getitem__)
        self._workers.start(death.slot)


def _loading(slot: int) -> str:
    return f"the start of worker {slot}"

"""Assign ranges of consecutive shards to idle workers, and reassign the shards of dead workers."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from imagewam_cli.errors import CacheError, warn
from imagewam_cli.files import partial_of
from imagewam_cli.kvcache.building.workers.worker import WorkerIdentity
from imagewam_cli.kvcache.format.manifest import ShardEntry
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import storage_at
from imagewam_cli.prefix.spec import KVSpec

ATTEMPTS = 3
"""Number of workers that may die at the same shard, or while loading the editor, before the build fails."""


@dataclass(frozen=True)
class WorkerReady:
    """A worker has loaded its editor."""

    slot: int
    facts: WorkerIdentity


@dataclass(frozen=True)
class ShardFinished:
    """A shard is durable."""

    slot: int
    entry: ShardEntry


@dataclass(frozen=True)
class WorkerIdle:
    """A worker has built all of its shards and is idle."""

    slot: int


@dataclass(frozen=True)
class WorkerDied:
    """A worker has died. how: predicate for messages, such as "was killed"."""

    slot: int
    how: str


Event = WorkerReady | ShardFinished | WorkerIdle | WorkerDied


class Workers(Protocol):
    """An engine: a way to run workers. Each worker has a slot, 0 to `count` - 1."""

    count: int

    def start(self, slot: int) -> None:
        """Start a worker in this slot, replacing a dead one; `WorkerReady` follows."""
        ...

    def give(self, slot: int, names: Sequence[str]) -> None:
        """Give shards to an idle worker; `ShardFinished` follows for each, then `WorkerIdle`."""
        ...

    def wait(self) -> Event:
        """Wait for the next event; raise what a worker raised."""
        ...

    def stop(self) -> None:
        """Kill all workers and wait until they have ended. Calling it twice is harmless."""
        ...


class WorkerPool:
    """A `ShardProducer` that hands shards to workers. Use it in `with`: workers start on entry and end on exit."""

    def __init__(
        self,
        workers: Workers,
        *,
        out: Location,
        identity: str,
        content: str | None = None,
        on_news: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            identity: identity of the dataset to read.
            content: digest of its files; None: unknown.
            on_news: receives a line when a worker is replaced.
        """
        self._workers, self._storage = workers, storage_at(out)
        self._identity, self._content, self._on_news = identity, content, on_news
        self._facts: WorkerIdentity | None = None
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

    def fingerprint(self) -> Mapping[str, object]:
        return self._known.fingerprint

    @property
    def _known(self) -> WorkerIdentity:
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
        """Build shards; see `ShardProducer.make`. Workers read the instructions from the dataset themselves.

        Raises:
            CacheError: workers have different editors or datasets, or `ATTEMPTS` workers died at one shard.
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
        """Give ranges of consecutive shards to idle workers.

        Long ranges come first, because a range decodes each video once; short ranges at the end, so that all workers
        finish at about the same time.
        """
        while self._free and self._waiting:
            count = max(1, len(self._waiting) // (2 * self._workers.count))
            slot, names = self._free.popleft(), self._waiting[:count]
            self._given[slot], self._waiting = names, self._waiting[count:]
            self._workers.give(slot, tuple(names))

    def _advance(self) -> ShardEntry | None:
        """Handle one event; return the shard that it finished, if any."""
        event = self._workers.wait()
        match event:
            case WorkerReady():
                self._require_same(event.facts, event.slot)
                self._deaths.pop(_loading(event.slot), None)
                self._free.append(event.slot)
            case ShardFinished():
                self._given[event.slot].remove(event.entry.file)
                return event.entry
            case WorkerIdle():
                self._given.pop(event.slot)
                self._free.append(event.slot)
            case WorkerDied():
                self._replace(event)
        return None

    def _require_same(self, facts: WorkerIdentity, slot: int) -> None:
        first = self._facts or facts
        content = self._content or first.content
        expected = Provenance(dataset=self._identity, content=content, fingerprint=first.fingerprint, spec=first.spec)
        here = Provenance(dataset=facts.dataset, content=facts.content, fingerprint=facts.fingerprint, spec=facts.spec)
        for found in expected.differences(here):
            raise CacheError(
                f"worker {slot} differs in its {found.what}: {found.here} instead of {found.there}",
                "install the same versions on all nodes, and make the same files available at the same paths",
            )
        if self._facts is None:
            for message in facts.warnings:  # all workers load the same, so one repeats for all
                warn(message)
        self._facts = first

    def _replace(self, death: WorkerDied) -> None:
        """Replace a dead worker and reassign its shards, unless the same shard has killed too many workers."""
        if death.slot in self._free:
            self._free.remove(death.slot)
        left = self._given.pop(death.slot, [])
        # shards finish in order, so the first one left is the one at which the worker died
        cause = left[0] if left else _loading(death.slot)
        self._deaths[cause] += 1
        if self._deaths[cause] >= ATTEMPTS:
            raise CacheError(
                f"{ATTEMPTS} workers died at {cause}; the last one, worker {death.slot}, {death.how}",
                "if memory is full, use fewer --workers or a smaller --batch; the same command resumes the build",
            )
        self._on_news(f"worker {death.slot} {death.how} at {cause}: starting a replacement")
        self._waiting = sorted([*self._waiting, *left], key=self._order.__getitem__)
        self._workers.start(death.slot)


def _loading(slot: int) -> str:
    return f"the start of worker {slot}"

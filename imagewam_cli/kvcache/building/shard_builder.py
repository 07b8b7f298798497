"""Compute the shards of a build in order. Background threads read rows, write shards and flush them to disk while the
editor computes."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from safetensors.torch import load

from imagewam_cli.data.augmentation import augmented
from imagewam_cli.data.types import Dataset, Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.building.encoding import batches, encode_rows, instruction_rows
from imagewam_cli.kvcache.building.shard_plan import BuildSettings, assigned_shards, plan_build, row_count
from imagewam_cli.kvcache.codecs.contract import Codec, FittedCodec
from imagewam_cli.kvcache.codecs.fitting import fit_codec
from imagewam_cli.kvcache.codecs.prefix import stored_parts
from imagewam_cli.kvcache.format.manifest import (
    CODEC,
    INSTRUCTIONS,
    ShardEntry,
)
from imagewam_cli.kvcache.format.shard import ShardWriter
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import storage_at
from imagewam_cli.prefix.spec import KVSpec


class ShardProducer(Protocol):
    """Computes shards: with an editor in this process (`ShardBuilder`), or with a pool of workers (`WorkerPool`)."""

    @property
    def spec(self) -> KVSpec:
        """Layout of the editor's prefixes."""
        ...

    def fingerprint(self) -> Mapping[str, object]:
        """Return the editor's fingerprint."""
        ...

    def make(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        *,
        on_finished: Callable[[ShardEntry], None],
        on_rows: Callable[[int], None],
    ) -> None:
        """Build the named shards and make them durable. Returns or raises only after all writing has stopped.

        `make` also builds two other files, each in a separate call: `CODEC`, the file of a fitted codec, which must
        exist before any shard is built; and `INSTRUCTIONS`, the shard with one row per instruction.

        Args:
            names: the shards.
            instructions: the dataset's instructions, in the order of the manifest.
            on_finished: called with the entry of each durable shard, in any order.
            on_rows: called with the number of rows after each batch.
        """
        ...


class ShardBuilder:
    """A `ShardProducer` with an editor in this process.

    A finished shard is made durable while the next one is computed, so `on_finished` is called from another thread.
    """

    def __init__(self, dataset: Dataset, editor: Editor, out: Location, codec: Codec, settings: BuildSettings) -> None:
        self.dataset, self.editor, self.codec, self.settings = dataset, editor, codec, settings
        self.storage = storage_at(out)
        plan = plan_build(dataset, editor.spec, codec, settings)
        self.layout = assigned_shards(plan, settings)
        self._rows = {e.index: row_count(e, settings) for shard in plan.shards for e in shard}

    @property
    def spec(self) -> KVSpec:
        return self.editor.spec

    def fingerprint(self) -> Mapping[str, object]:
        return self.editor.fingerprint()

    def make(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        *,
        on_finished: Callable[[ShardEntry], None],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Build shards; see `ShardProducer.make`. names: in the order of the dataset."""
        if tuple(names) == (CODEC,):
            on_finished(self._fit())
            return
        numbers = {text: i for i, text in enumerate(instructions)}
        with _one_worker() as reading, _one_worker() as writing, _one_worker() as finishing:
            before: Future[None] | None = None  # at most one shard waits to be flushed, which bounds disk use
            for name, rows in self._streams(names, reading):
                writer = self._encode(name, rows, numbers, writing, on_rows)
                try:
                    if before is not None:
                        before.result()
                except BaseException:
                    writer.close()
                    raise
                before = finishing.submit(self._finish, name, writer, on_finished)
            if before is not None:
                before.result()

    def _fit(self) -> ShardEntry:
        """Fit the codec and write its file. Returns its entry."""
        assert isinstance(self.codec, FittedCodec)
        self._ready, data = fit_codec(self.codec, self.editor, self.dataset, self.settings.stride)
        self.storage.write(CODEC, data)
        checksum = checksum_of(data)
        return ShardEntry(file=CODEC, rows=0, bytes=len(data), checksum=checksum, episodes=(), batch=0)

    @functools.cached_property
    def _ready(self) -> Codec:
        """The codec, ready to encode: with its fitted parameters, if it has any."""
        if not isinstance(self.codec, FittedCodec):
            return self.codec
        return self.codec.restored(self.spec, load(self.storage.read(CODEC)))

    def _streams(self, names: Sequence[str], reading: Executor) -> Iterator[tuple[str, Iterator[Row]]]:
        """Yield the name and rows of each shard. One stream serves all: a new one would decode its video again."""
        if tuple(names) == (INSTRUCTIONS,):
            yield INSTRUCTIONS, instruction_rows(self.dataset)
            return
        shard_of = {episode: name for name in names for episode in self.layout[name]}
        rows = self.dataset.rows(episodes=list(shard_of), stride=self.settings.stride) if names else iter(())
        # Grouping rows by shard reads one row past the shard's end, so the dataset's end-of-episode checks run before
        # the shard is finished.
        views = augmented(rows, self.settings.augmentation)
        ahead = _ahead(views, self.settings.batch, reading)
        groups = itertools.groupby(ahead, key=lambda row: shard_of[row.episode])
        for name in names:
            found, group = next(groups, (None, iter(())))
            yield name, group if found == name else iter(())

    def _encode(
        self,
        name: str,
        rows: Iterator[Row],
        numbers: Mapping[str, int],
        writing: Executor,
        on_rows: Callable[[int], None],
    ) -> ShardWriter:
        """Encode and write the rows of a shard, without finishing it. Writing runs in a background thread."""
        once = name == INSTRUCTIONS
        count = len(numbers) if once else sum(self._rows[episode] for episode in self.layout[name])
        parts = stored_parts(self.spec, self._ready, by_instruction=once)
        writer = ShardWriter(self.storage.draft(name), count, parts)
        before: Future[None] | None = None
        try:
            for batch in batches(rows, self.settings.batch):
                encoded = encode_rows(self.editor, self._ready, batch, numbers, by_instruction=once)
                if before is not None:
                    before.result()
                before = writing.submit(writer.append, *encoded)
                on_rows(len(batch))
            if before is not None:
                before.result()
        except BaseException:
            writing.submit(writer.close)  # queued, so that the file is not closed during a write
            raise
        return writer

    def _finish(self, name: str, writer: ShardWriter, on_finished: Callable[[ShardEntry], None]) -> None:
        """Make the shard durable, then report it: the manifest must not list a shard that a power cut could lose."""
        with writer:
            checksum = writer.finish()
        self.storage.add(name, writer.path)
        entry = ShardEntry(
            file=name,
            rows=writer.rows,
            bytes=writer.bytes,
            checksum=checksum,
            episodes=self.layout.get(name, ()),
            batch=self.settings.batch,
        )
        on_finished(entry)


@contextmanager
def _one_worker() -> Iterator[ThreadPoolExecutor]:
    """Provide a single-thread executor. On exit, wait for the thread even if Ctrl-C is pressed again.

    The build's lock is released after this, and must not be released while the thread writes.
    """
    worker = ThreadPoolExecutor(max_workers=1)
    try:
        yield worker
    finally:
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                worker.shutdown(wait=True)
                break
            except KeyboardInterrupt as again:
                interrupted = again
        if interrupted is not None:
            raise interrupted


def _ahead(rows: Iterator[Row], count: int, reading: Executor) -> Iterator[Row]:
    """Yield the rows, reading up to `count` of them ahead in the thread `reading`."""
    waiting = deque(reading.submit(next, rows, None) for _ in range(count))
    while (row := waiting.popleft().result()) is not None:
        waiting.append(reading.submit(next, rows, None))
        yield row

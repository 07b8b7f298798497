"""Building a cache: dataset rows through an editor into shards.

Episodes are grouped into shards beforehand, from the dataset's metadata alone, so that an interrupted build goes on at
the first shard that is missing and ends with the same bytes as an undisturbed one: a shard's content does not depend on
what was computed before it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.data.augmentation import AS_RECORDED, Augmentation, augmented
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import Dataset, EpisodeInfo, Row
from imagewam_cli.editor import Editor, PrefixKV
from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.codec import Codec, LearnedCodec, all_finite, stored_parts
from imagewam_cli.kvcache.learned import CODEC, fit_codec
from imagewam_cli.kvcache.location import Location
from imagewam_cli.kvcache.lock import FILES_LOCK, LOCK, part_lock
from imagewam_cli.kvcache.manifest import (
    INSTRUCTIONS,
    MANIFEST,
    TABLE,
    VERSION,
    DatasetEntry,
    Manifest,
    ShardEntry,
    Share,
    part_manifests,
)
from imagewam_cli.kvcache.shard import INDEX_BYTES, ShardWriter
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec
from imagewam_cli.kvcache.storage import Storage, holds, manifest_file_at, put_manifest, storage_at
from imagewam_cli.kvcache.table import FrameTable

_SAMPLED = (8, 24, 40, 56)
"""Which of the first rows are kept with their pictures."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How a cache is cut and computed; `stride` and `augmentation` say which rows it has."""

    stride: int = 1
    augmentation: Augmentation = AS_RECORDED
    batch: int = 16
    shard_mb: float = 256.0
    share: Share | None = None
    """Build only this part of the shards; the other parts are other workers'."""

    def __post_init__(self) -> None:
        if self.stride < 1 or self.batch < 1 or self.shard_mb <= 0:
            raise UsageError("stride and batch must be at least 1, the shard size positive")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build will write: episodes per shard, rows, bytes."""

    shards: tuple[tuple[EpisodeInfo, ...], ...]
    rows: int
    bytes_per_row: int
    instruction_bytes: int
    """Of what is stored once for each instruction, all together."""

    @property
    def total_bytes(self) -> int:
        """Of all rows and instructions, the headers of the files aside."""
        return self.rows * self.bytes_per_row + self.instruction_bytes


def plan_build(dataset: Dataset, spec: KVSpec, codec: Codec, settings: BuildSettings) -> BuildPlan:
    """Group the episodes into shards of about `shard_mb`."""
    row_bytes = bytes_per_row(spec, codec)
    shards: list[tuple[EpisodeInfo, ...]] = []
    current: list[EpisodeInfo] = []
    size = 0
    for episode in dataset.episodes():
        episode_bytes = _rows_of(episode, settings) * row_bytes
        if current and size + episode_bytes > settings.shard_mb * 1e6:
            shards.append(tuple(current))
            current, size = [], 0
        current.append(episode)
        size += episode_bytes
    if current:
        shards.append(tuple(current))
    rows = sum(_rows_of(e, settings) for shard in shards for e in shard)
    return BuildPlan(
        shards=tuple(shards),
        rows=rows,
        bytes_per_row=row_bytes,
        instruction_bytes=_instruction_bytes(dataset, spec, codec),
    )


def bytes_per_row(spec: KVSpec, codec: Codec) -> int:
    """Bytes that a row takes in a shard: K and V, a byte per token for `valid`, and the index."""
    return sum(part.row_bytes for part in stored_parts(spec, codec).values()) + INDEX_BYTES


def _instruction_bytes(dataset: Dataset, spec: KVSpec, codec: Codec) -> int:
    parts = stored_parts(spec, codec, by_instruction=True)
    if not parts:
        return 0
    return len(instructions_of(dataset)) * (sum(part.row_bytes for part in parts.values()) + INDEX_BYTES)


class ShardMaker(Protocol):
    """What computes shards: an editor of this process (`ShardBuilder`), or workers that have one each (`engines`)."""

    @property
    def spec(self) -> KVSpec:
        """Of the editor."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """Of the editor."""
        ...

    def make(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        *,
        on_finished: Callable[[ShardEntry], None],
        on_rows: Callable[[int], None],
    ) -> None:
        """Make the shards of these names, whole and durable. `CODEC` alone is the file of a codec that is fitted, and
        has to be there before any shard; `INSTRUCTIONS` alone the shard of what follows from these.

        instructions: the dataset's, as the manifest numbers them; on_finished: called for each shard, in any order;
        on_rows(n): after each n rows. It ends, also by an exception, when nothing of it writes any more.
        """
        ...


def build_cache(
    dataset: Dataset,
    editor: Editor,
    out: Location,
    codec: Codec,
    settings: BuildSettings,
    *,
    on_start: Callable[[BuildPlan], None] = lambda plan: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_damage: Callable[[str], None] = lambda file: None,
) -> Manifest:
    """Write (or go on writing) the cache `out`, a folder or a URL. `on_start(plan)` is called once nothing was refused;
    `on_rows(n)` after each n rows, and once for those already there; `on_damage(file)` for each shard that was finished
    and is not what it was: it is built again.

    Raises:
        CacheError: `out` holds another cache; the message gives both values of what differs. Or somebody else writes
            there, or the disk has no room, or the editor does not keep to its own layout, or gives numbers that the
            codec cannot hold.
        UsageError: `out` holds something that is not a cache, or is a URL that nothing installed reaches.
    """
    maker = ShardBuilder(dataset, editor, out, codec, settings)
    return build_with(maker, dataset, out, codec, settings, on_start=on_start, on_rows=on_rows, on_damage=on_damage)


def build_with(
    maker: ShardMaker,
    dataset: Dataset,
    out: Location,
    codec: Codec,
    settings: BuildSettings,
    *,
    on_start: Callable[[BuildPlan], None] = lambda plan: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_damage: Callable[[str], None] = lambda file: None,
) -> Manifest:
    """`build_cache`, by whatever makes the shards; this process holds the lock and writes all but the shards."""
    plan = plan_build(dataset, maker.spec, codec, settings)
    storage = storage_at(out)
    _refuse_foreign(storage)
    name = MANIFEST if settings.share is None else settings.share.manifest
    with storage.lock(LOCK if settings.share is None else part_lock(name)):
        build = _Build(maker, dataset, storage, codec, settings, plan, on_rows, on_damage)
        on_start(plan)
        return build.run()


def require_continuable(
    dataset: Dataset, editor: str, out: Location, codec: Codec, settings: BuildSettings
) -> Manifest | None:
    """What a build into `out` would go on with, looked at before the editor of that name is loaded; None: nothing.

    Raises:
        CacheError, UsageError: `build_cache` would refuse it, whatever the editor's weights and settings are.
    """
    storage = storage_at(out)
    _refuse_foreign(storage)
    existing = _existing(storage, settings)
    if existing is not None:
        here = (dataset.info.identity, settings.stride, settings.augmentation, codec.name, editor)
        _refuse_differing(storage.place, _known_pairs(existing, here))
    return existing


@contextmanager
def _one_worker() -> Iterator[ThreadPoolExecutor]:
    """Ends when the worker has ended, however often Ctrl-C is pressed: the lock is not to go while it writes."""
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
    """The rows; the next `count` of them are read while one is used."""
    waiting = deque(reading.submit(next, rows, None) for _ in range(count))
    while (row := waiting.popleft().result()) is not None:
        waiting.append(reading.submit(next, rows, None))
        yield row


class _Build:
    """One build under its lock."""

    def __init__(
        self,
        maker: ShardMaker,
        dataset: Dataset,
        storage: Storage,
        codec: Codec,
        settings: BuildSettings,
        plan: BuildPlan,
        on_rows: Callable[[int], None],
        on_damage: Callable[[str], None],
    ) -> None:
        self.maker, self.dataset, self.storage, self.codec = maker, dataset, storage, codec
        self.settings, self.plan, self.on_rows = settings, plan, on_rows
        self.cut = own_cut(plan, settings)
        self._rows = {e.index: _rows_of(e, settings) for shard in plan.shards for e in shard}
        self.name = MANIFEST if settings.share is None else settings.share.manifest
        self.manifest = _start(dataset, maker, storage, codec, settings, plan, self.name)
        faults = storage.faults(self.manifest.entries)
        for file in faults:
            on_damage(file)
        self.kept = {entry.file: entry for entry in self.manifest.shards if entry.file not in faults}
        """Shards that are there, by name."""
        if self.manifest.by_instruction is not None and self.manifest.by_instruction.file in faults:
            self.manifest = dataclasses.replace(self.manifest, by_instruction=None)

    def run(self) -> Manifest:
        with self.storage.lock(FILES_LOCK, wait=True):  # parts that start together need the same ones
            self._fit_codec()
            self._make_instructions()
        missing = [name for name in self.cut if name not in self.kept]
        rows = sum(self._rows[episode] for name in missing for episode in self.cut[name])
        _require_room(self.storage, rows * self.plan.bytes_per_row)
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(self.kept.values()))
        for entry in self.manifest.shards:
            self.on_rows(entry.rows)
        self.maker.make(missing, self.manifest.instructions, on_finished=self._list, on_rows=self.on_rows)
        put_manifest(self.storage, self.manifest, self.name)
        return self.manifest

    def _fit_codec(self) -> None:
        """The file of a codec that is fitted, where it is not there.

        Raises:
            CacheError: shards were encoded by one that is lost.
        """
        if not isinstance(self.codec, LearnedCodec):
            return
        checksum = self.manifest.files.get(CODEC, self._others_codec())
        if not holds(self.storage, CODEC, checksum):
            found = self._made(CODEC).checksum
            if self.kept and found != checksum:
                raise CacheError(
                    f"{self.storage.place}/{CODEC} is missing or damaged, and fitting {self.codec.name} again here "
                    "gives another",
                    "build the cache again in another folder",
                )
            checksum = found
        self.manifest = dataclasses.replace(self.manifest, files={**self.manifest.files, CODEC: checksum})
        put_manifest(self.storage, self.manifest, self.name)

    def _others_codec(self) -> str:
        """Its checksum in another part."""
        others = (manifest_file_at(self.storage, name) for name in part_manifests(self.storage.names()))
        return next((other.files[CODEC] for other in others if CODEC in other.files), "")

    def _make_instructions(self) -> None:
        """The shard of what follows from the instructions alone, where there is such a layer."""
        parts = stored_parts(self.maker.spec, self.codec, by_instruction=True)
        if parts and self.manifest.by_instruction is None:
            self.manifest = dataclasses.replace(self.manifest, by_instruction=self._made(INSTRUCTIONS))
            put_manifest(self.storage, self.manifest, self.name)

    def _made(self, name: str) -> ShardEntry:
        found: list[ShardEntry] = []
        self.maker.make([name], self.manifest.instructions, on_finished=found.append, on_rows=lambda rows: None)
        return found[0]

    def _list(self, entry: ShardEntry) -> None:
        """A durable shard becomes known."""
        self.kept[entry.file] = entry
        entries = tuple(self.kept[name] for name in self.cut if name in self.kept)
        self.manifest = dataclasses.replace(self.manifest, shards=entries)
        put_manifest(self.storage, self.manifest, self.name)


class ShardBuilder:
    """Shards by name, with an editor of this process: a `ShardMaker`. A finished shard is made durable beside the
    computation of the next, so `on_finished` is called in another thread."""

    def __init__(self, dataset: Dataset, editor: Editor, out: Location, codec: Codec, settings: BuildSettings) -> None:
        self.dataset, self.editor, self.codec, self.settings = dataset, editor, codec, settings
        self.storage = storage_at(out)
        plan = plan_build(dataset, editor.spec, codec, settings)
        self.cut = own_cut(plan, settings)
        self._rows = {e.index: _rows_of(e, settings) for shard in plan.shards for e in shard}

    @property
    def spec(self) -> KVSpec:
        return self.editor.spec

    def fingerprint(self) -> Mapping[str, Any]:
        return self.editor.fingerprint()

    def make(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        *,
        on_finished: Callable[[ShardEntry], None],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """As `ShardMaker.make`; names: in the order of the dataset."""
        if tuple(names) == (CODEC,):
            on_finished(self._fitted())
            return
        numbers = {text: i for i, text in enumerate(instructions)}
        with _one_worker() as reading, _one_worker() as writing, _one_worker() as finishing:
            before: Future[None] | None = None
            for name, rows in self._streams(names, reading):
                writer = self._encoded(name, rows, numbers, writing, on_rows)
                try:
                    if before is not None:
                        before.result()
                except BaseException:
                    writer.close()
                    raise
                before = finishing.submit(self._finish, name, writer, on_finished)
            if before is not None:
                before.result()

    def _fitted(self) -> ShardEntry:
        """Fit the codec and write its file."""
        assert isinstance(self.codec, LearnedCodec)
        self._ready, data = fit_codec(self.codec, self.editor, self.dataset, self.settings.stride)
        self.storage.write(CODEC, data)
        checksum = xxhash.xxh3_128_hexdigest(data)
        return ShardEntry(file=CODEC, rows=0, bytes=len(data), checksum=checksum, episodes=(), batch=0)

    @functools.cached_property
    def _ready(self) -> Codec:
        """The codec, ready to encode."""
        if not isinstance(self.codec, LearnedCodec):
            return self.codec
        return self.codec.restored(self.spec, load(self.storage.read(CODEC)))

    def _streams(self, names: Sequence[str], reading: Executor) -> Iterator[tuple[str, Iterator[Row]]]:
        """Shard by shard, its rows: one stream for all, as a new one would decode a video from its beginning again."""
        if tuple(names) == (INSTRUCTIONS,):
            yield INSTRUCTIONS, instruction_rows(self.dataset)
            return
        shard_of = {episode: name for name in names for episode in self.cut[name]}
        rows = self.dataset.rows(episodes=list(shard_of), stride=self.settings.stride) if names else iter(())
        # grouped, not counted: a group ends when the row after it was read, so the checks at an episode's end have run
        views = augmented(rows, self.settings.augmentation)
        ahead = _ahead(views, self.settings.batch, reading)
        groups = itertools.groupby(ahead, key=lambda row: shard_of[row.episode])
        for name in names:
            given, group = next(groups, (None, iter(())))
            yield name, group if given == name else iter(())

    def _encoded(
        self,
        name: str,
        rows: Iterator[Row],
        numbers: Mapping[str, int],
        writing: Executor,
        on_rows: Callable[[int], None],
    ) -> ShardWriter:
        """Encode and write the rows of a shard, all but its end; a batch is written while the next one is computed."""
        once = name == INSTRUCTIONS
        count = len(numbers) if once else sum(self._rows[episode] for episode in self.cut[name])
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
            writing.submit(writer.close)  # behind what is being written
            raise
        return writer

    def _finish(self, name: str, writer: ShardWriter, on_finished: Callable[[ShardEntry], None]) -> None:
        """Make the shard durable, then known."""
        with writer:
            checksum = writer.finish()
        self.storage.add(name, writer.path)
        entry = ShardEntry(
            file=name,
            rows=writer.rows,
            bytes=writer.bytes,
            checksum=checksum,
            episodes=self.cut.get(name, ()),
            batch=self.settings.batch,
        )
        on_finished(entry)


def encode_rows(
    editor: Editor, codec: Codec, rows: Sequence[Row], numbers: Mapping[str, int], *, by_instruction: bool = False
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """The index columns of these rows, and their tensors as `stored_parts` names them. numbers: of the instructions;
    by_instruction: the tensors that are stored once for each of these.

    Raises:
        CacheError: the editor does not keep to its layout, or the codec cannot hold its numbers.
    """
    prefix = editor.encode([r.images for r in rows], [r.instruction for r in rows])
    check_prefix(prefix, editor.spec, len(rows))
    tensors = stored_tensors(prefix, editor.spec, codec, by_instruction=by_instruction)
    index = {
        "row": [r.row for r in rows],
        "episode": [r.episode for r in rows],
        "frame": [r.frame for r in rows],
        "instruction": [numbers[r.instruction] for r in rows],
        "variant": [r.variant for r in rows],
    }
    return index, tensors


def stored_tensors(prefix: PrefixKV, spec: KVSpec, codec: Codec, *, by_instruction: bool = False) -> dict[str, Tensor]:
    """The prefix as `stored_parts` names its tensors, on the CPU.

    Raises:
        CacheError: the codec cannot hold its numbers.
    """
    tensors: dict[str, Tensor] = {}
    for i, (kv, layer) in enumerate(zip(prefix.layers, spec.layers, strict=True)):
        if layer.by_instruction != by_instruction:
            continue
        stored = codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid)
        _require_held(stored, kv, layer, codec)
        tensors |= {f"layer.{i}.{name}": tensor.cpu() for name, tensor in stored.items()}
    if spec.valid_tokens and spec.valid_by_instruction == by_instruction:
        everywhere = torch.ones(prefix.batch, spec.valid_tokens, dtype=torch.bool)
        tensors["valid"] = everywhere if prefix.valid is None else prefix.valid.cpu()
    return tensors


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """The distinct instructions, in order of appearance."""
    return tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))


def instruction_rows(dataset: Dataset) -> Iterator[Row]:
    """The first row that each distinct instruction is given with, in order of appearance."""
    first: dict[str, Row] = {}
    for row in dataset.rows(images=False):
        first.setdefault(row.instruction, row)
    wanted = {row.row for row in first.values()}
    episodes = list(dict.fromkeys(row.episode for row in first.values()))
    return (row for row in dataset.rows(episodes=episodes) if row.row in wanted)


def _refuse_foreign(storage: Storage) -> None:
    """Files that are not a cache's stay alone in their folder."""
    # a manifest is looked for afterwards: other parts that begin meanwhile write theirs before anything else
    strange = any(not name.startswith(("manifest.", LOCK)) for name in storage.names())
    names = storage.names() if strange else []
    if strange and MANIFEST not in names and not part_manifests(names):
        raise UsageError(f"{storage.place} holds something that is not a cache", "choose an empty folder with --out")


def _existing(storage: Storage, settings: BuildSettings) -> Manifest | None:
    """What is built there: this build's own manifest, or another part's, or the whole's, whose files it shares."""
    own, names = MANIFEST if settings.share is None else settings.share.manifest, storage.names()
    found = (name for name in (own, MANIFEST, *part_manifests(names)) if name in names)
    return next((manifest_file_at(storage, name) for name in found), None)


def dataset_entry(
    dataset: Dataset, cameras: Sequence[str], stride: int, augmentation: Augmentation = AS_RECORDED
) -> DatasetEntry:
    """What is written down of a dataset of which every `stride`-th frame is taken. cameras: those that are seen."""
    info = dataset.info
    return DatasetEntry(
        path=str(info.root.resolve()),
        format=info.format,
        identity=info.identity,
        fps=info.fps,
        state_names=info.state_names,
        action_names=info.action_names,
        episodes=info.total_episodes,
        rows=info.total_rows,
        stride=stride,
        keys=dataclasses.replace(info.keys, cameras=tuple(cameras)),
        augmentation=augmentation,
    )


def _start(
    dataset: Dataset,
    maker: ShardMaker,
    storage: Storage,
    codec: Codec,
    settings: BuildSettings,
    plan: BuildPlan,
    name: str,
) -> Manifest:
    """The manifest to go on from: the one of this name that is there, or a new one."""
    there = _existing(storage, settings)
    existing = there if name in storage.names() else None
    table, instructions = FrameTable.of(dataset.rows(images=False))
    contents = {TABLE: table.to_bytes()}
    samples = existing.files.get(SAMPLES, "") if existing is not None else ""
    kept = {SAMPLES: samples} if holds(storage, SAMPLES, samples) else {}
    if plan.shards and not kept:
        contents[SAMPLES] = samples_bytes(dataset, settings.stride)
    fresh = Manifest(
        version=VERSION,
        fingerprint=maker.fingerprint(),
        spec=maker.spec,
        codec=codec.name,
        dataset=dataset_entry(dataset, maker.spec.cameras, settings.stride, settings.augmentation),
        instructions=instructions,
        files=kept | {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items()},
        total_rows=plan.rows,
    )
    if there is not None:
        _refuse_other(storage.place, there, fresh)
        _refuse_other_cut(storage.place, there, plan)
    if existing is None:
        put_manifest(storage, fresh, name)  # first of all, so that a build stopped from here on is known as one
    with storage.lock(FILES_LOCK, wait=True):  # parts that start together write the same files
        for name, content in contents.items():
            if not holds(storage, name, fresh.files[name]):
                storage.write(name, content)
    return existing or fresh


def _refuse_other(out: str, existing: Manifest, fresh: Manifest) -> None:
    """Going on with a cache of other contents would mix the two."""
    here = (
        fresh.dataset.identity,
        fresh.dataset.stride,
        fresh.dataset.augmentation,
        fresh.codec,
        fresh.fingerprint.get("editor"),
    )
    pairs = [
        *_known_pairs(existing, here),
        ("editor weights", str(existing.fingerprint.get("weights"))[:16], str(fresh.fingerprint.get("weights"))[:16]),
        *_setting_pairs(existing, fresh),
        ("editor recipe", existing.fingerprint.get("recipe"), fresh.fingerprint.get("recipe")),
        ("prefix layout", existing.spec, fresh.spec),
        ("states or actions", existing.files.get(TABLE), fresh.files[TABLE]),
    ]
    _refuse_differing(out, pairs)


def _known_pairs(
    existing: Manifest, here: tuple[str, int, Augmentation, str, object]
) -> list[tuple[str, object, object]]:
    """What can be compared without the editor's weights. here: dataset, stride, augmentation, codec and editor of this
    build."""
    dataset, stride, augmentation, codec, editor = here
    return [
        ("dataset", existing.dataset.identity[:16], dataset[:16]),
        ("stride", existing.dataset.stride, stride),
        ("augmentation", existing.dataset.augmentation, augmentation),
        ("codec", existing.codec, codec),
        ("editor", existing.fingerprint.get("editor"), editor),
    ]


def _refuse_differing(out: str, pairs: Sequence[tuple[str, object, object]]) -> None:
    for what, there, here in pairs:
        if there != here:
            raise CacheError(
                f"{out} is a cache of another {what}: it has {there}, this build has {here}",
                "choose another folder with --out, or delete this one",
            )


def _setting_pairs(existing: Manifest, fresh: Manifest) -> list[tuple[str, object, object]]:
    there, here = (dict(m.fingerprint.get("settings") or {}) for m in (existing, fresh))
    return [(f"setting {key!r}", there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys())]


def _refuse_other_cut(out: str, existing: Manifest, plan: BuildPlan) -> None:
    """Shards of another size share names with those of this build and would be overwritten."""
    planned = _cut(plan)
    for entry in existing.shards:
        if planned.get(entry.file) != entry.episodes:
            raise CacheError(
                f"{out} is cut into other shards: its {entry.file} holds {_episodes_text(entry.episodes)}, "
                f"this build would put {_episodes_text(planned.get(entry.file, ()))} there",
                "use the same --shard-mb as before, or choose another folder with --out",
            )


def own_cut(plan: BuildPlan, settings: BuildSettings) -> dict[str, tuple[int, ...]]:
    """File name -> episodes of each shard that is this build's to make."""
    cut = _cut(plan)
    return cut if settings.share is None else {name: cut[name] for name in settings.share.of(list(cut))}


def _cut(plan: BuildPlan) -> dict[str, tuple[int, ...]]:
    """File name -> episodes of each shard."""
    return {f"shard-{i:05d}.safetensors": tuple(e.index for e in shard) for i, shard in enumerate(plan.shards)}


def _episodes_text(episodes: Sequence[int]) -> str:
    return f"episodes {episodes[0]} to {episodes[-1]}" if episodes else "no episode"


def _require_room(storage: Storage, needed: int) -> None:
    free = storage.room()
    if free is not None and needed > free:
        raise CacheError(
            f"the cache needs {needed / 1e9:.1f} GB more, {storage.place} has {free / 1e9:.1f} GB free",
            "choose another --out, a smaller --codec, or fewer --layers, --segments or rows (--stride)",
        )


def _rows_of(episode: EpisodeInfo, settings: BuildSettings) -> int:
    return -(-episode.length // settings.stride) * settings.augmentation.variants


def samples_bytes(dataset: Dataset, stride: int) -> bytes:
    """The file of samples: a few of the first rows, with their pictures."""
    first = list(islice(dataset.rows(stride=stride), _SAMPLED[-1] + 1))
    return Samples.of([first[i] for i in _SAMPLED if i < len(first)] or first[-1:]).to_bytes()


def _require_held(stored: Mapping[str, Tensor], kv: LayerKV, layer: LayerSpec, codec: Codec) -> None:
    for tensor in stored.values():
        if tensor.is_floating_point() and not all_finite(tensor):
            greatest = max(float(x.abs().max()) for x in (kv.k, kv.v))
            raise CacheError(
                f"layer {layer.name}: numbers up to {greatest:.3g} do not fit {codec.name}",
                "store them with another --codec, in another folder",
            )


def check_prefix(prefix: PrefixKV, spec: KVSpec, rows: int) -> None:
    """Stop an editor that does not keep to its own layout, before it fills a disk or a model learns from it.

    Raises:
        CacheError: names the layer, what was given and what the layout says.
    """
    if len(prefix.layers) != len(spec.layers):
        raise CacheError(f"the editor gave {len(prefix.layers)} layers, its spec says {len(spec.layers)}")
    for kv, layer in zip(prefix.layers, spec.layers, strict=True):
        expected = (rows, layer.tokens, layer.kv_heads, layer.head_dim)
        for part, values in (("K", kv.k), ("V", kv.v)):
            given = tuple(values.shape)
            if given != expected:
                raise CacheError(f"layer {layer.name}: the editor gave {part} of {given}, its spec says {expected}")
            if not all_finite(values):
                raise CacheError(f"layer {layer.name}: the editor gave {part} with numbers that are not finite")
    if prefix.valid is not None and tuple(prefix.valid.shape) != (rows, spec.valid_tokens):
        raise CacheError(
            f"the editor gave `valid` of {tuple(prefix.valid.shape)}, its spec says {(rows, spec.valid_tokens)}"
        )


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows, `size` at a time."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

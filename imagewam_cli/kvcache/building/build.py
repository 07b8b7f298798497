"""Building a cache: one build under its lock, the manifest that it goes on from, and what it refuses to go on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from imagewam_cli.data.augmentation import AS_RECORDED, Augmentation
from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.building.encoding import samples_bytes
from imagewam_cli.kvcache.building.shard_builder import ShardBuilder, ShardProducer
from imagewam_cli.kvcache.building.shard_plan import (
    BuildPlan,
    BuildSettings,
    assigned_shards,
    plan_build,
    row_count,
    shard_layout,
)
from imagewam_cli.kvcache.codecs.contract import Codec, FittedCodec
from imagewam_cli.kvcache.codecs.prefix import stored_parts
from imagewam_cli.kvcache.format.frame_table import FrameTable
from imagewam_cli.kvcache.format.manifest import (
    CODEC,
    INSTRUCTIONS,
    MANIFEST,
    TABLE,
    VERSION,
    BuildPart,
    DatasetEntry,
    Manifest,
    ShardEntry,
    part_manifests,
)
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.lock import FILES_LOCK, LOCK, part_lock
from imagewam_cli.kvcache.storage.manifests import (
    holds,
    lock_whole,
    manifest_at,
    manifests_at,
    put_manifest,
    storage_at,
)


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
    producer = ShardBuilder(dataset, editor, out, codec, settings)
    return build_with(producer, dataset, out, codec, settings, on_start=on_start, on_rows=on_rows, on_damage=on_damage)


def build_with(
    producer: ShardProducer,
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
    plan = plan_build(dataset, producer.spec, codec, settings)
    storage = storage_at(out)
    _refuse_foreign(storage)
    name = MANIFEST if settings.part is None else settings.part.manifest
    with lock_whole(storage) if settings.part is None else storage.lock(part_lock(name)):
        build = _Build(producer, dataset, storage, codec, settings, plan, on_rows, on_damage)
        on_start(plan)
        return build.run()


def require_resumable(
    dataset: Dataset, editor: str, out: Location, codec: Codec, settings: BuildSettings
) -> Manifest | None:
    """What a build into `out` would go on with, looked at before the editor of that name is loaded; None: nothing.

    Raises:
        CacheError, UsageError: `build_cache` would refuse it, whatever the editor's weights and settings are.
    """
    storage = storage_at(out)
    _refuse_foreign(storage)
    there = _united(storage)
    if there is not None:
        here = Provenance(
            dataset=dataset.info.identity,
            stride=settings.stride,
            augmentation=settings.augmentation,
            codec=codec.name,
            editor=editor,
        )
        _refuse_other(storage.address, there.provenance, here)
    return there


class _Build:
    """One build under its lock."""

    def __init__(
        self,
        producer: ShardProducer,
        dataset: Dataset,
        storage: Storage,
        codec: Codec,
        settings: BuildSettings,
        plan: BuildPlan,
        on_rows: Callable[[int], None],
        on_damage: Callable[[str], None],
    ) -> None:
        self.producer, self.dataset, self.storage, self.codec = producer, dataset, storage, codec
        self.settings, self.plan, self.on_rows = settings, plan, on_rows
        self.layout = assigned_shards(plan, settings)
        self._rows = {e.index: row_count(e, settings) for shard in plan.shards for e in shard}
        self.name = MANIFEST if settings.part is None else settings.part.manifest
        with _beginning(storage, settings):
            there = _united(storage)
            self.manifest = _start(dataset, producer, storage, codec, settings, plan, there, self.name)
        self.encoded = there is not None and len(there.shards) > 0
        """Whether there are shards, of other parts too."""
        faults = storage.damaged_shards(self.manifest.entries)
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
        missing = [name for name in self.layout if name not in self.kept]
        rows = sum(self._rows[episode] for name in missing for episode in self.layout[name])
        _require_room(self.storage, rows * self.plan.bytes_per_row)
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(self.kept.values()))
        for entry in self.manifest.shards:
            self.on_rows(entry.rows)
        self.producer.make(missing, self.manifest.instructions, on_finished=self._list, on_rows=self.on_rows)
        put_manifest(self.storage, self.manifest, self.name)
        return self.manifest

    def _fit_codec(self) -> None:
        """The file of a codec that is fitted, where it is not there.

        Raises:
            CacheError: shards were encoded by one that is lost.
        """
        if not isinstance(self.codec, FittedCodec):
            return
        there = _united(self.storage)
        checksum = "" if there is None else there.files.get(CODEC, "")
        if not holds(self.storage, CODEC, checksum):
            found = self._made(CODEC).checksum
            if self.encoded and found != checksum:
                raise CacheError(
                    f"{self.storage.address}/{CODEC} is missing or damaged, and fitting {self.codec.name} again here "
                    "gives another",
                    "build the cache again in another folder",
                )
            checksum = found
        files = dict(sorted({**self.manifest.files, CODEC: checksum}.items()))
        self._change(dataclasses.replace(self.manifest, files=files))

    def _make_instructions(self) -> None:
        """The shard of what follows from the instructions alone, where there is such a layer and nobody made it."""
        if not stored_parts(self.producer.spec, self.codec, by_instruction=True):
            return
        there = _united(self.storage)
        made = None if there is None else there.by_instruction
        if made is None or self.storage.damaged_shards([made]):
            made = self._made(INSTRUCTIONS)
        self._change(dataclasses.replace(self.manifest, by_instruction=made))

    def _change(self, manifest: Manifest) -> None:
        """Where it is a change."""
        if manifest != self.manifest:
            self.manifest = manifest
            put_manifest(self.storage, manifest, self.name)

    def _made(self, name: str) -> ShardEntry:
        found: list[ShardEntry] = []
        self.producer.make([name], self.manifest.instructions, on_finished=found.append, on_rows=lambda rows: None)
        return found[0]

    def _list(self, entry: ShardEntry) -> None:
        """A durable shard becomes known."""
        self.kept[entry.file] = entry
        entries = tuple(self.kept[name] for name in self.layout if name in self.kept)
        self.manifest = dataclasses.replace(self.manifest, shards=entries)
        put_manifest(self.storage, self.manifest, self.name)


def _refuse_foreign(storage: Storage) -> None:
    """Files that are not a cache's stay alone in their folder."""
    # a manifest is looked for afterwards: other parts that begin meanwhile write theirs before anything else
    strange = any(not name.startswith(("manifest.", LOCK)) for name in storage.names())
    names = storage.names() if strange else []
    if strange and MANIFEST not in names and not part_manifests(names):
        raise UsageError(f"{storage.address} holds something that is not a cache", "choose an empty folder with --out")


def _united(storage: Storage) -> Manifest | None:
    """What is there of the cache, by the whole's manifest and all parts'."""
    return manifest_at(storage) if manifests_at(storage) else None


@contextmanager
def _beginning(storage: Storage, settings: BuildSettings) -> Iterator[None]:
    """While it looks at what is there and says that it is there itself. A part is refused where the whole is written,
    or a part of another number, which may have the same shards."""
    if settings.part is None:
        yield
        return
    with storage.lock(FILES_LOCK, wait=True), storage.lock(LOCK):
        for name in part_manifests(storage.names()):
            if BuildPart.named(name).count != settings.part.count:
                with storage.lock(part_lock(name)):
                    pass
        yield


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
    producer: ShardProducer,
    storage: Storage,
    codec: Codec,
    settings: BuildSettings,
    plan: BuildPlan,
    there: Manifest | None,
    name: str,
) -> Manifest:
    """The manifest to go on from, with what is there of its shards already. there: all that is there of the cache."""
    table, instructions = FrameTable.of(dataset.rows(images=False))
    contents = {TABLE: table.to_bytes()}
    kept = {} if there is None else {n: c for n, c in there.files.items() if n != TABLE and holds(storage, n, c)}
    if plan.shards and SAMPLES not in kept:
        contents[SAMPLES] = samples_bytes(dataset, settings.stride)
    fresh = Manifest(
        version=VERSION,
        fingerprint=producer.fingerprint(),
        spec=producer.spec,
        codec=codec.name,
        dataset=dataset_entry(dataset, producer.spec.cameras, settings.stride, settings.augmentation),
        instructions=instructions,
        files=dict(sorted((kept | {n: checksum_of(content) for n, content in contents.items()}).items())),
        total_rows=plan.rows,
    )
    if there is not None:
        _refuse_other(storage.address, there.provenance, fresh.provenance)
        _refuse_other_cut(storage.address, there, plan)
        own = assigned_shards(plan, settings)
        shards = tuple(entry for entry in there.shards if entry.file in own)
        fresh = dataclasses.replace(fresh, shards=shards, by_instruction=there.by_instruction)
    if name not in storage.names():
        put_manifest(storage, fresh, name)  # first of all, so that a build stopped from here on is known as one
    for file, content in contents.items():
        if not holds(storage, file, fresh.files[file]):
            storage.write(file, content)
    return fresh


def _refuse_other(out: str, there: Provenance, here: Provenance) -> None:
    """Stop before a build mixes its rows with those of another cache."""
    for found in there.differences(here):
        raise CacheError(
            f"{out} is a cache of another {found.what}: it has {found.there}, this build has {found.here}",
            "choose another folder with --out, or delete this one",
        )


def _refuse_other_cut(out: str, existing: Manifest, plan: BuildPlan) -> None:
    """Shards of another size share names with those of this build and would be overwritten."""
    planned = shard_layout(plan)
    for entry in existing.shards:
        if planned.get(entry.file) != entry.episodes:
            raise CacheError(
                f"{out} is cut into other shards: its {entry.file} holds {_episodes_text(entry.episodes)}, "
                f"this build would put {_episodes_text(planned.get(entry.file, ()))} there",
                "use the same --shard-mb as before, or choose another folder with --out",
            )


def _episodes_text(episodes: Sequence[int]) -> str:
    return f"episodes {episodes[0]} to {episodes[-1]}" if episodes else "no episode"


def _require_room(storage: Storage, needed: int) -> None:
    free = storage.free_bytes()
    if free is not None and needed > free:
        raise CacheError(
            f"the cache needs {needed / 1e9:.1f} GB more, {storage.address} has {free / 1e9:.1f} GB free",
            "choose another --out, a smaller --codec, or fewer --layers, --segments or rows (--stride)",
        )

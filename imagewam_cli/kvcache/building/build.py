"""Build or resume a cache: locking, resuming from the manifest, rejecting incompatible caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from imagewam_cli.data.augmentation import NO_AUGMENTATION, Augmentation
from imagewam_cli.data.dataset_files import DatasetFiles, named_changes
from imagewam_cli.data.formats import check_pictures
from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError, UsageError, warn
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.building.dataset_checksums import checksums_name, dataset_checksums
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
from imagewam_cli.kvcache.format.frame_table import FrameTable, warn_of_copies
from imagewam_cli.kvcache.format.manifest import (
    CODEC,
    DATASET_FILES,
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
from imagewam_cli.kvcache.format.provenance import ALL, CONTENT, Provenance
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.dataset_record import changed_files
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import (
    holds,
    lock_whole,
    put_manifest,
    storage_at,
    stored_manifest,
)
from imagewam_cli.lock import FILES_LOCK, LOCK, part_lock


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
    on_checksums: Callable[[int], None] = lambda files: None,
) -> Manifest:
    """Build the cache `out`, a folder or a URL, or resume it.

    Args:
        on_start: called with the plan, after all checks have passed.
        on_rows: called with n after each n rows, and once for the rows of each shard that is kept.
        on_damage: called with the name of each listed shard that is missing or damaged, before it is rebuilt.
        on_checksums: called with the number of files of the dataset whose checksums are recorded, before they are read.

    Raises:
        CacheError: `out` holds another cache (the message gives both values), another process writes there, the disk
            is full, the editor's output does not match its layout, or the codec cannot represent its numbers.
        UsageError: `out` holds something that is not a cache, or no installed package reaches its URL.
    """
    producer = ShardBuilder(dataset, editor, out, codec, settings)
    return build_with(
        producer,
        dataset,
        out,
        codec,
        settings,
        on_start=on_start,
        on_rows=on_rows,
        on_damage=on_damage,
        on_checksums=on_checksums,
    )


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
    on_checksums: Callable[[int], None] = lambda files: None,
) -> Manifest:
    """Build a cache as `build_cache` does, with the shards of any producer.

    This process holds the lock and writes everything but the shards.
    """
    plan = plan_build(dataset, producer.spec, codec, settings)
    storage = storage_at(out)
    _require_cache_folder(storage)
    name = MANIFEST if settings.part is None else settings.part.manifest
    with lock_whole(storage) if settings.part is None else storage.lock(part_lock(name)):
        build = _Build(producer, dataset, storage, codec, settings, plan)
        return build.run(on_start, on_rows, on_damage, on_checksums)


def require_resumable(
    dataset: Dataset, editor: str, out: Location, codec: Codec, settings: BuildSettings
) -> Manifest | None:
    """Return the manifest that a build into `out` would resume from, or None. Needs no editor, only its name.

    Raises:
        CacheError, UsageError: `build_cache` would refuse `out`, whatever the editor's weights and settings are.
    """
    storage = storage_at(out)
    _require_cache_folder(storage)
    there = stored_manifest(storage)
    if there is not None:
        files = _files_of(dataset, there)
        here = Provenance(
            dataset=dataset.info.identity,
            selected=dataset.info.selected or ALL,
            content=None if files is None else files.digest,
            stride=settings.stride,
            augmentation=settings.augmentation,
            codec=codec.name,
            editor=editor,
        )
        _require_same_provenance(storage, there, here, files)
    return there


def _files_of(dataset: Dataset, manifest: Manifest) -> DatasetFiles | None:
    """Return the files of a dataset, to compare with those of a cache; None if they cannot be compared."""
    cameras = manifest.dataset.keys.cameras
    if manifest.dataset.content is None or not dataset.info.cameras.keys() >= set(cameras):
        return None
    return DatasetFiles.of(dataset, cameras)


class _Build:
    """One build, run while its lock is held."""

    def __init__(
        self,
        producer: ShardProducer,
        dataset: Dataset,
        storage: Storage,
        codec: Codec,
        settings: BuildSettings,
        plan: BuildPlan,
    ) -> None:
        self.producer, self.dataset, self.storage, self.codec = producer, dataset, storage, codec
        self.settings, self.plan = settings, plan
        self.assigned = assigned_shards(plan, settings)
        self._rows = {e.index: row_count(e, settings) for shard in plan.shards for e in shard}
        self.name = MANIFEST if settings.part is None else settings.part.manifest
        self.manifest: Manifest
        """The manifest that this build writes."""
        self.kept: dict[str, ShardEntry] = {}
        """Finished shards, by file name."""
        self.files: DatasetFiles | None = None
        """The files of the dataset when the build began; None if they are not recorded."""

    def run(
        self,
        on_start: Callable[[BuildPlan], None],
        on_rows: Callable[[int], None],
        on_damage: Callable[[str], None],
        on_checksums: Callable[[int], None],
    ) -> Manifest:
        # The manifests are read once, here. Parts of one cache may start together, and all need the same codec and the
        # same shard of instructions. Both are written and listed only under FILES_LOCK, which is held from this read
        # until they are listed. So the manifests that were read stay up to date, and the next part to take the lock
        # sees these files.
        with self.storage.lock(FILES_LOCK, wait=True):
            with _lock_against_other_splits(self.storage, self.settings):
                there = stored_manifest(self.storage)
                self.manifest = self._begin(there)
            on_start(self.plan)
            self._fit_codec(there)
            self._make_instructions(there, on_damage)
        damaged = self.storage.damaged_shards(self.manifest.shards)
        for file in damaged:
            on_damage(file)
        self.kept = {entry.file: entry for entry in self.manifest.shards if entry.file not in damaged}
        missing = [name for name in self.assigned if name not in self.kept]
        rows = sum(self._rows[episode] for name in missing for episode in self.assigned[name])
        _require_free_bytes(self.storage, rows * self.plan.bytes_per_row)
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(self.kept.values()))
        for entry in self.manifest.shards:
            on_rows(entry.rows)
        self.producer.make(missing, self.manifest.instructions, on_finished=self._add_entry, on_rows=on_rows)
        self._record_checksums(on_checksums)
        put_manifest(self.storage, self.manifest, self.name)
        return self.manifest

    def _begin(self, there: Manifest | None) -> Manifest:
        """Write the files that all parts share, and return the manifest to continue from.

        there: the cache as it is stored, with the shards of all parts.

        Raises:
            CacheError: it was built from another dataset or editor, or is split into different shards.
        """
        storage, dataset, spec, settings = self.storage, self.dataset, self.producer.spec, self.settings
        check_pictures(dataset)
        table, instructions = FrameTable.from_rows(dataset.rows(images=False))
        warn_of_copies(table, dataset.info.state_names, dataset.info.action_names)
        if there is not None:
            table = table.stored_as(there.files.get(TABLE, ""))
        files = DatasetFiles.of(dataset, spec.cameras)
        entry = dataset_entry(dataset, spec.cameras, settings.stride, settings.augmentation, files=files)
        contents = {TABLE: table.to_bytes()}
        fresh = Manifest(
            version=VERSION,
            fingerprint=self.producer.fingerprint(),
            spec=spec,
            codec=self.codec.name,
            dataset=entry,
            instructions=instructions,
            files={TABLE: checksum_of(contents[TABLE])},
            total_rows=self.plan.rows,
        )
        kept: dict[str, str] = {}
        if there is not None:
            _require_same_provenance(storage, there, fresh.provenance, files)
            _require_same_shards(storage.address, there, self.plan)
            kept = {n: c for n, c in there.files.items() if n != TABLE and holds(storage, n, c)}
            shards = tuple(entry for entry in there.shards if entry.file in self.assigned)
            fresh = dataclasses.replace(fresh, shards=shards, by_instruction=there.by_instruction)
            if there.provenance.counted_unused_weights(fresh.provenance):
                warn(
                    f"{storage.address} was begun by an older imagewam, whose digest of the editor's weights counted "
                    "files that are not used, such as a LoRA: the weights are the same"
                )
                fresh = dataclasses.replace(fresh, fingerprint=there.fingerprint)
            if unrecorded := there.provenance.unrecorded(fresh.provenance):
                warn(
                    f"{storage.address} was begun by an older imagewam, which did not record the "
                    f"{' and the '.join(unrecorded)}: they are not compared; a build into another folder records them"
                )
                # What the older one read is not known: today's files must not be recorded as those that it read.
                fresh, files = dataclasses.replace(fresh, dataset=dataclasses.replace(entry, content=None)), None
        if self.plan.shards and SAMPLES not in kept:
            contents[SAMPLES] = samples_bytes(dataset, settings.stride)
        if files is not None:
            contents[DATASET_FILES] = files.to_bytes()
        listed = kept | {name: checksum_of(content) for name, content in contents.items()}
        fresh = dataclasses.replace(fresh, files=dict(sorted(listed.items())))
        self.files = files
        if self.name not in storage.names():
            # Write the manifest first, so that an interrupted build is recognized as a cache from this point on.
            put_manifest(storage, fresh, self.name)
        for file, content in contents.items():
            if not holds(storage, file, fresh.files[file]):
                storage.write(file, content)
        return fresh

    def _fit_codec(self, there: Manifest | None) -> None:
        """Fit the codec unless its file is stored.

        Raises:
            CacheError: stored shards were encoded with a fitted codec whose file is missing.
        """
        if not isinstance(self.codec, FittedCodec):
            return
        checksum = "" if there is None else there.files.get(CODEC, "")
        if not holds(self.storage, CODEC, checksum):
            found = self._build_shard(CODEC).checksum
            if there is not None and there.shards and found != checksum:
                raise CacheError(
                    f"{self.storage.address}/{CODEC} is missing or damaged, and refitting {self.codec.name} gives "
                    "different parameters",
                    "build the cache again in another folder",
                )
            checksum = found
        files = dict(sorted({**self.manifest.files, CODEC: checksum}.items()))
        self._store_manifest(dataclasses.replace(self.manifest, files=files))

    def _make_instructions(self, there: Manifest | None, on_damage: Callable[[str], None]) -> None:
        """Build the shard with one row per instruction, unless it is already stored or no layer needs it."""
        if not stored_parts(self.producer.spec, self.codec, by_instruction=True):
            return
        made = None if there is None else there.by_instruction
        if made is not None and self.storage.damaged_shards([made]):
            on_damage(made.file)
            made = None
        self._store_manifest(dataclasses.replace(self.manifest, by_instruction=made or self._build_shard(INSTRUCTIONS)))

    def _record_checksums(self, on_checksums: Callable[[int], None]) -> None:
        """Record the SHA-256 of the dataset's files, which were just read, unless they are recorded.

        Raises:
            CacheError: a file was replaced during the build.
        """
        part, storage = self.settings.part, self.storage
        if self.files is None:
            return
        shards = shard_layout(self.plan)
        content = dataset_checksums(storage, self.manifest, self.dataset, part, shards, on_checksums)
        changed = self.files.changes_at(self.dataset.info.root, {})
        if changed:
            raise CacheError(
                f"the dataset changed during the build: {named_changes(changed)}",
                f"delete {storage.address} and build it again",
            )
        name, checksum = checksums_name(part), checksum_of(content)
        if content and not holds(storage, name, checksum):
            storage.write(name, content)
        if content:
            files = {**self.manifest.files, name: checksum}
            self.manifest = dataclasses.replace(self.manifest, files=dict(sorted(files.items())))

    def _store_manifest(self, manifest: Manifest) -> None:
        """Replace the stored manifest if this one differs."""
        if manifest != self.manifest:
            self.manifest = manifest
            put_manifest(self.storage, manifest, self.name)

    def _build_shard(self, name: str) -> ShardEntry:
        """Build one shard, or fit the codec if `name` is its file. Returns its entry."""
        found: list[ShardEntry] = []
        self.producer.make([name], self.manifest.instructions, on_finished=found.append, on_rows=lambda rows: None)
        return found[0]

    def _add_entry(self, entry: ShardEntry) -> None:
        """Add a durable shard to the manifest."""
        self.kept[entry.file] = entry
        entries = tuple(self.kept[name] for name in self.assigned if name in self.kept)
        self.manifest = dataclasses.replace(self.manifest, shards=entries)
        put_manifest(self.storage, self.manifest, self.name)


def _require_cache_folder(storage: Storage) -> None:
    """Check that the folder is empty or holds a cache.

    Raises:
        UsageError: it has files, and none is a manifest.
    """
    # Names are listed again before the manifest is looked for: another part that is starting stores its manifest first.
    strange = any(not name.startswith(("manifest.", LOCK)) for name in storage.names())
    names = storage.names() if strange else []
    if strange and MANIFEST not in names and not part_manifests(names):
        raise UsageError(f"{storage.address} holds something that is not a cache", "choose an empty folder with --out")


@contextmanager
def _lock_against_other_splits(storage: Storage, settings: BuildSettings) -> Iterator[None]:
    """Check that neither the whole cache nor a part of another N is being written, because their shards would overlap;
    hold the lock in the meantime.

    Keep the lock until the part's manifest is stored: a build of the whole cache detects parts by their manifests.
    """
    if settings.part is None:
        yield  # the whole cache is locked already
        return
    with storage.lock(LOCK):
        for name in part_manifests(storage.names()):
            if BuildPart.named(name).count != settings.part.count:
                with storage.lock(part_lock(name)):
                    pass
        yield


def dataset_entry(
    dataset: Dataset,
    cameras: Sequence[str],
    stride: int,
    augmentation: Augmentation = NO_AUGMENTATION,
    *,
    files: DatasetFiles | None,
) -> DatasetEntry:
    """Return the manifest's entry for every `stride`-th frame of a dataset.

    cameras: those that the editor sees. files: the dataset's files; None if unknown.
    """
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
        selected=info.selected,
        augmentation=augmentation,
        content=None if files is None else files.digest,
    )


def _require_same_provenance(storage: Storage, there: Manifest, here: Provenance, files: DatasetFiles | None) -> None:
    """Raise CacheError if the cache was built from something else, before rows of two caches are mixed."""
    for found in there.provenance.differences(here):
        if found.what == CONTENT:
            what = f"was built from other files of the dataset: {changed_files(storage, there, files)}"
        else:
            what = f"differs in its {found.what}: {found.there}, but this build has {found.here}"
        raise CacheError(
            f"{storage.address} holds a cache that {what}", "choose another folder with --out, or delete this one"
        )


def _require_same_shards(out: str, existing: Manifest, plan: BuildPlan) -> None:
    """Raise CacheError if a stored shard has the name of a planned shard but other episodes."""
    planned = shard_layout(plan)
    for entry in existing.shards:
        if planned.get(entry.file) != entry.episodes:
            raise CacheError(
                f"{out} is split into different shards: its {entry.file} holds {_episodes_text(entry.episodes)}, "
                f"but this build would store {_episodes_text(planned.get(entry.file, ()))} in it",
                "use the same --shard-mb as before, or choose another folder with --out",
            )


def _episodes_text(episodes: Sequence[int]) -> str:
    return f"episodes {episodes[0]} to {episodes[-1]}" if episodes else "no episode"


def _require_free_bytes(storage: Storage, needed: int) -> None:
    free = storage.free_bytes()
    if free is not None and needed > free:
        raise CacheError(
            f"the cache needs {needed / 1e9:.1f} GB more, but {storage.address} has {free / 1e9:.1f} GB free",
            "choose another disk with --out, a smaller --codec, fewer --layers or --segments, or a larger --stride",
        )

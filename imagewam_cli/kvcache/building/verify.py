"""Verify every byte of a cache against its checksums, and rebuild damaged rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from imagewam_cli.data.augmentation import augmented
from imagewam_cli.data.dataset_files import DatasetFiles
from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.building.dataset_checksums import dataset_checksums
from imagewam_cli.kvcache.building.encoding import batches, encode_rows, instruction_rows, samples_bytes
from imagewam_cli.kvcache.codecs.fitting import fit_codec, stored_codec
from imagewam_cli.kvcache.codecs.prefix import stored_parts
from imagewam_cli.kvcache.format.frame_table import FrameTable
from imagewam_cli.kvcache.format.manifest import (
    CODEC,
    DATASET_FILES,
    SHARDS,
    TABLE,
    Manifest,
    ShardEntry,
    is_dataset_checksums,
    part_of_checksums,
)
from imagewam_cli.kvcache.format.provenance import ALL, CONTENT, Provenance
from imagewam_cli.kvcache.format.shard import INDEX_KEYS, Shard, ShardWriter
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.dataset_record import changed_files
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import (
    holds,
    lock_whole,
    manifest_at,
    manifests_at,
    put_manifest,
    storage_at,
)
from imagewam_cli.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Damage of one file. what: description. rows: damaged rows of a shard; None if the whole file is unusable."""

    file: str
    what: str
    rows: tuple[int, ...] | None = None


def verify_cache(
    cache: Location, *, rows: bool = True, on_rows: Callable[[int], None] = lambda rows: None
) -> list[Damage]:
    """Return the damaged files. on_rows: called with n after each shard of n rows.

    rows: read every byte. False checks only files, sizes and heads of shards, about a thousandth of the bytes; of a
        remote store only sizes.

    Raises:
        CacheError: there is no cache, or its manifest is damaged, so that nothing can be verified.
    """
    storage = storage_at(cache)
    manifest, names = manifest_at(storage), storage.names()
    found = [
        Damage(file=name, what="differs from its checksum" if name in names else "is missing")
        for name, checksum in manifest.files.items()
        if not holds(storage, name, checksum)
    ]
    errors = {} if rows else storage.damaged_shards(manifest.entries)
    for entry in manifest.entries:
        if rows:
            with storage.open_current(entry) as path:
                damage = _shard_damage(path, entry)
        else:
            damage = _file_damage(entry, errors)
        if damage is not None:
            found.append(damage)
        on_rows(entry.rows)
    return found


def repair_cache(
    cache: Location,
    damages: Sequence[Damage],
    dataset: Dataset,
    editor: Editor,
    *,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """Rebuild the damaged files. In a shard, rebuild only the batches that contain damaged rows.

    Returns the shards whose bytes changed, for example because another machine computed them.

    Raises:
        CacheError: the dataset or the editor is not that of the cache; nothing is changed.
    """
    storage = storage_at(cache)
    with lock_whole(storage):
        manifest = manifest_at(storage)
        require_provenance(storage, manifest, dataset, editor)
        _repair_files(storage, manifest, damages, dataset, editor)
        changed = []
        for damage in damages:
            entry = next((e for e in manifest.entries if f"{SHARDS}/{e.file}" == damage.file), None)
            if entry is not None:
                repaired = _repair_shard(storage, manifest, entry, damage, dataset, editor, on_rows)
                if repaired.checksum != entry.checksum:
                    changed.append(entry.file)
                for name, listing in manifests_at(storage):
                    if entry in listing.entries:
                        put_manifest(storage, listing.with_entry(repaired), name)
                manifest = manifest.with_entry(repaired)
        return changed


def _file_damage(entry: ShardEntry, errors: Mapping[str, CacheError]) -> Damage | None:
    """Return the damage that the storage reports for a shard without reading it, or None."""
    if entry.file not in errors:
        return None
    return Damage(file=f"{SHARDS}/{entry.file}", what=errors[entry.file].message.rpartition(f"{entry.file} ")[2])


def _shard_damage(path: Path, entry: ShardEntry) -> Damage | None:
    """Return the damage found by reading every byte of a shard, or None."""
    file = f"{SHARDS}/{entry.file}"
    if not path.exists():
        return Damage(file=file, what="is missing")
    try:
        shard = Shard.open(path)
        shard.require_listed(entry.bytes, entry.checksum)
    except CacheError as error:
        return Damage(file=file, what=error.message.removeprefix(f"{path} "))
    rows = shard.damaged_rows()
    if not len(rows):
        return None
    numbers = ", ".join(str(shard.array("row")[row]) for row in rows[:5])
    more = ", …" if len(rows) > 5 else ""
    what = f"{len(rows)} of {entry.rows} rows differ from their checksums (dataset rows {numbers}{more})"
    return Damage(file=file, what=what, rows=tuple(rows.tolist()))


def require_provenance(storage: Storage, manifest: Manifest, dataset: Dataset, editor: Editor) -> None:
    """Check that the dataset and the editor are those that the cache was built from.

    Raises:
        CacheError: names the first difference with both values.
    """
    files = None if manifest.dataset.content is None else DatasetFiles.of(dataset, editor.spec.cameras)
    here = Provenance(
        dataset=dataset.info.identity,
        selected=dataset.info.selected or ALL,
        content=None if files is None else files.digest,
        fingerprint=editor.fingerprint(),
        spec=editor.spec,
    )
    for found in manifest.provenance.differences(here):
        if found.what == CONTENT:
            what = f"was built from other files of the dataset: {changed_files(storage, manifest, files)}"
        else:
            what = f"differs in its {found.what}: {found.there} in the cache, {found.here} here"
        raise CacheError(
            f"the cache {what}",
            "pass the original dataset and weights (--dataset, --weights), or build the cache again",
        )


def _repair_files(
    storage: Storage, manifest: Manifest, damages: Sequence[Damage], dataset: Dataset, editor: Editor
) -> None:
    damaged = {damage.file for damage in damages} & manifest.files.keys()
    stride = manifest.dataset.stride
    make: dict[str, Callable[[], bytes]] = {
        TABLE: lambda: FrameTable.from_rows(dataset.rows(images=False))[0].stored_as(manifest.files[TABLE]).to_bytes(),
        SAMPLES: lambda: samples_bytes(dataset, stride),
        DATASET_FILES: lambda: _dataset_files(dataset, manifest),
        CODEC: lambda: fit_codec(Registry.installed().codecs.load(manifest.codec), editor, dataset, stride)[1],
    }
    shards = [entry.file for entry in manifest.shards]
    for name in damaged:
        if is_dataset_checksums(name):
            content = dataset_checksums(storage, manifest, dataset, part_of_checksums(name), shards)
        else:
            content = make[name]()
        if checksum_of(content) != manifest.files[name]:
            raise CacheError(f"{name}, when recomputed, differs from the cache's", "build the cache again")
        storage.write(name, content)


def _dataset_files(dataset: Dataset, manifest: Manifest) -> bytes:
    files = DatasetFiles.of(dataset, manifest.spec.cameras)
    return b"" if files is None else files.to_bytes()


def _repair_shard(
    storage: Storage,
    manifest: Manifest,
    entry: ShardEntry,
    damage: Damage,
    dataset: Dataset,
    editor: Editor,
    on_rows: Callable[[int], None],
) -> ShardEntry:
    """Rebuild a shard in its original batches, so that the same editor gives the same bytes."""
    codec = stored_codec(storage, manifest)
    damaged = set(damage.rows if damage.rows is not None else range(entry.rows))
    numbers = {text: i for i, text in enumerate(manifest.instructions)}
    once, origin = entry == manifest.by_instruction, manifest.dataset
    frames = instruction_rows(dataset) if once else dataset.rows(episodes=entry.episodes, stride=origin.stride)
    stream = frames if once else augmented(frames, origin.augmentation)
    parts = stored_parts(manifest.spec, codec, by_instruction=once)
    with storage.open_current(entry) as path, ShardWriter(storage.draft(entry.file), entry.rows, parts) as writer:
        old = Shard.open(path) if damage.rows is not None else None
        first = 0
        for rows in batches(stream, entry.batch):
            positions = range(first, first + len(rows))
            if old is None or not damaged.isdisjoint(positions):
                index, tensors = encode_rows(editor, codec, rows, numbers, by_instruction=once)
            else:
                index, tensors = _copy_batch(old, positions)
            writer.append(index, tensors)
            first += len(rows)
            on_rows(len(rows))
        repaired = dataclasses.replace(entry, checksum=writer.finish(), bytes=writer.bytes)
        storage.add(entry.file, writer.path)
        return repaired


def _copy_batch(shard: Shard, positions: range) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return index and tensors of undamaged rows, as `encode_rows` would."""
    rows = np.arange(positions.start, positions.stop)
    index = {name: shard.array(name)[rows].tolist() for name in INDEX_KEYS}
    return index, shard.read(rows)

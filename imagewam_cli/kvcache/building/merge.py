"""Merge parts of a cache that were built independently."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from imagewam_cli.data.dataset_files import checksum_lines
from imagewam_cli.errors import CacheError, warn
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.manifest import (
    DATASET_CHECKSUMS,
    Manifest,
    is_dataset_checksums,
    part_manifests,
    part_of_checksums,
    unite,
)
from imagewam_cli.kvcache.format.provenance import CONTENT
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.dataset_record import changed_files, recorded_checksums, recorded_files
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import holds, lock_whole, manifests_at, put_manifest, storage_at


def merge_cache(out: Location, others: Sequence[Location] = ()) -> Manifest:
    """Merge the parts in `out`, after copying those from other folders. A second call changes nothing.

    The manifest of the whole cache is stored last; then the manifests of the parts are deleted.

    Raises:
        CacheError: there is nothing to merge, the parts belong to different caches, a part in `out` is being built, or
            a shard does not match its manifest.
    """
    target = storage_at(out)
    with lock_whole(target):
        own = part_manifests(target.names())
        found = [
            (storage, name, manifest)
            for storage in (target, *map(storage_at, others))
            for name, manifest in manifests_at(storage)
        ]
        if not found:
            raise CacheError(
                f"{target.address} contains no part of a cache", "build parts with `imagewam cache --part i/N`"
            )
        _require_same_files(found)
        manifest = unite([(f"{storage.address}/{name}", part) for storage, name, part in found])
        recorded: dict[str, str] = {}
        for storage, _, part in found:
            recorded |= recorded_checksums(storage, part.files)
            _copy_part(storage, part, target)
        manifest = _with_one_record(target, manifest, recorded)
        put_manifest(target, manifest)
        for name in (*own, *(name for name in target.names() if part_of_checksums(name) is not None)):
            target.delete(name)
    return manifest


def _with_one_record(target: Storage, manifest: Manifest, recorded: Mapping[str, str]) -> Manifest:
    """Store the checksums that the parts recorded of the dataset's files as one file, as the build of a whole cache
    does."""
    files = {name: checksum for name, checksum in manifest.files.items() if not is_dataset_checksums(name)}
    if recorded:
        content = checksum_lines(dict(sorted(recorded.items())))
        files[DATASET_CHECKSUMS] = checksum_of(content)
        target.write(DATASET_CHECKSUMS, content)
    return dataclasses.replace(manifest, files=dict(sorted(files.items())))


def _require_same_files(found: Sequence[tuple[Storage, str, Manifest]]) -> None:
    """Check that all parts were built from the same files of the dataset, as far as their manifests record them.

    Raises:
        CacheError: two parts differ; names the files.
    """
    known = [part for part in found if part[2].dataset.content is not None]
    for storage, name, part in known[1:]:
        first_storage, first_name, first = known[0]
        if part.dataset.content != first.dataset.content:
            differ = changed_files(first_storage, first, recorded_files(storage, part))
            raise CacheError(
                f"{first_storage.address}/{first_name} and {storage.address}/{name} were built from different files "
                f"of the dataset: {differ}",
                "build the parts from copies of one dataset",
            )
    if known and len(known) < len(found):
        older = next(f"{storage.address}/{name}" for storage, name, part in found if part.dataset.content is None)
        warn(
            f"{older} was built by an older imagewam, which did not record the {CONTENT}: "
            "they are not compared; a build into another folder records them"
        )


def _copy_part(storage: Storage, part: Manifest, target: Storage) -> None:
    """Verify shards and files of a part and copy them to the target."""
    for error in storage.damaged_shards(part.entries).values():
        raise error
    for entry in part.entries if storage is not target else ():
        with storage.open_current(entry) as path:
            target.add(entry.file, path)
    for name, checksum in part.files.items():
        if not is_dataset_checksums(name) and not holds(target, name, checksum):
            if not holds(storage, name, checksum):
                raise CacheError(f"{storage.address}/{name} is missing or damaged", "run the part's command again")
            target.write(name, storage.read(name))

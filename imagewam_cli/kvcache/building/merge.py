"""Merge parts of a cache that were built independently."""

from __future__ import annotations

from collections.abc import Sequence

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.manifest import Manifest, part_manifests, unite
from imagewam_cli.kvcache.storage.contract import Storage
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
        manifest = unite([(f"{storage.address}/{name}", part) for storage, name, part in found])
        for storage, _, part in found:
            _copy_part(storage, part, target)
        put_manifest(target, manifest)
        for name in own:
            target.delete(name)
    return manifest


def _copy_part(storage: Storage, part: Manifest, target: Storage) -> None:
    """Verify shards and files of a part and copy them to the target."""
    for error in storage.damaged_shards(part.entries).values():
        raise error
    for entry in part.entries if storage is not target else ():
        with storage.open_current(entry) as path:
            target.add(entry.file, path)
    for name, checksum in part.files.items():
        if not holds(target, name, checksum):
            if not holds(storage, name, checksum):
                raise CacheError(f"{storage.address}/{name} is missing or damaged", "run the part's command again")
            target.write(name, storage.read(name))

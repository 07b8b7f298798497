"""Read, write and lock the manifests of a cache in any storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from imagewam_cli.config import to_dict
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.manifest import (
    MANIFEST,
    Manifest,
    manifest_names,
    no_cache,
    parse_manifest,
    part_manifests,
    unite,
    with_checksum,
)
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.local import LocalStorage
from imagewam_cli.kvcache.storage.location import Location, location
from imagewam_cli.lock import part_lock


def storage_at(address: Location) -> Storage:
    """Return the storage of a folder or URL.

    Raises:
        UsageError: no installed package supports the URL.
    """
    address = location(address) if isinstance(address, str) else address
    if isinstance(address, Path):
        return LocalStorage(address)
    from imagewam_cli.kvcache.storage.remote import RemoteStorage

    return RemoteStorage(address)


def read_manifest(address: Location) -> Manifest:
    """Read the manifest of a cache, united with those of parts that are not merged yet.

    Raises:
        CacheError: there is no cache, its version is newer, its manifest is damaged or names a file outside the folder,
            or its parts belong to different caches.
        UsageError: no installed package supports the URL.
    """
    return manifest_at(storage_at(address))


def manifest_at(storage: Storage) -> Manifest:
    """Return the manifest of the cache in this storage; see `read_manifest`."""
    # a merge may delete the listed parts before they are read; then the second read finds the merged manifest
    found = stored_manifest(storage) or stored_manifest(storage)
    if found is None:
        raise no_cache(storage.address)
    return found


def stored_manifest(storage: Storage) -> Manifest | None:
    """Read each manifest once and unite them; None if there is none.

    Raises:
        CacheError: as `read_manifest`.
    """
    found = manifests_at(storage)
    return unite([(f"{storage.address}/{name}", manifest) for name, manifest in found]) if found else None


def manifests_at(storage: Storage) -> list[tuple[str, Manifest]]:
    """Read the manifest of the whole cache, if any, and those of its parts, with their names."""
    found = []
    for name in manifest_names(storage.names()):
        with suppress(FileNotFoundError, IsADirectoryError):
            found.append((name, parse_manifest(storage.read(name), f"{storage.address}/{name}")))
    return found


@contextmanager
def lock_whole(storage: Storage) -> Iterator[None]:
    """Lock the cache and each of its parts for writing.

    Raises:
        CacheError: another process holds one of the locks.
    """
    with ExitStack() as locks:
        locks.enter_context(storage.lock())
        for name in part_manifests(storage.names()):
            locks.enter_context(storage.lock(part_lock(name)))
        yield


def put_manifest(storage: Storage, manifest: Manifest, name: str = MANIFEST) -> None:
    """Store a manifest, replacing the one of this name."""
    storage.write(name, with_checksum(to_dict(manifest)))


def holds(storage: Storage, name: str, checksum: str) -> bool:
    """Return True if the stored file has this checksum (XXH3-128)."""
    try:
        return checksum_of(storage.read(name)) == checksum
    except (FileNotFoundError, IsADirectoryError):
        return False

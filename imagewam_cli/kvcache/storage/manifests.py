"""The manifest of a cache, wherever the cache is stored."""

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
    signed,
    unite,
)
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.local import LocalStorage
from imagewam_cli.kvcache.storage.location import Location, location
from imagewam_cli.kvcache.storage.lock import part_lock


def storage_at(address: Location) -> Storage:
    """
    Raises:
        UsageError: a URL that no installed package reaches.
    """
    address = location(address) if isinstance(address, str) else address
    if isinstance(address, Path):
        return LocalStorage(address)
    from imagewam_cli.kvcache.storage.remote import RemoteStorage

    return RemoteStorage(address)


def read_manifest(address: Location) -> Manifest:
    """The manifest of a cache; together with those of its parts that were not merged yet.

    Raises:
        CacheError: no cache, a newer version, damaged, a name that leaves the folder, or parts of different caches.
        UsageError: a URL that no installed package reaches.
    """
    return manifest_at(storage_at(address))


def manifest_at(storage: Storage) -> Manifest:
    """Return the manifest of the cache in this storage; see `read_manifest`."""
    # a merge may delete the listed parts before they are read: the second look finds the whole manifest
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
    """The whole's, where there is one, and those of parts."""
    found = []
    for name in manifest_names(storage.names()):
        with suppress(FileNotFoundError, IsADirectoryError):
            found.append((name, parse_manifest(storage.read(name), f"{storage.address}/{name}")))
    return found


@contextmanager
def lock_whole(storage: Storage) -> Iterator[None]:
    """Hold the cache and each of its parts for writing.

    Raises:
        CacheError: somebody writes one of them.
    """
    with ExitStack() as locks:
        locks.enter_context(storage.lock())
        for name in part_manifests(storage.names()):
            locks.enter_context(storage.lock(part_lock(name)))
        yield


def put_manifest(storage: Storage, manifest: Manifest, name: str = MANIFEST) -> None:
    """Replace the manifest."""
    storage.write(name, signed(to_dict(manifest)))


def holds(storage: Storage, name: str, checksum: str) -> bool:
    """Whether the file is there, with this XXH3-128 of its bytes."""
    try:
        return checksum_of(storage.read(name)) == checksum
    except (FileNotFoundError, IsADirectoryError):
        return False

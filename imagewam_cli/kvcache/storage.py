"""Where a cache lies, as its writers and readers need it: a folder, or a remote store (`kvcache.remote`).

Shards are written and read as local files. A folder holds them itself; a remote store takes finished ones in, and gives
out copies.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

import xxhash

from imagewam_cli.config import to_dict
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.location import Location, location
from imagewam_cli.kvcache.lock import LOCK, part_lock, write_lock
from imagewam_cli.kvcache.manifest import (
    MANIFEST,
    SHARDS,
    Manifest,
    ShardEntry,
    manifest_names,
    no_cache,
    parse_manifest,
    part_manifests,
    repair_hint,
    signed,
    sync_file,
    sync_folder,
    unite,
    write_atomically,
)
from imagewam_cli.kvcache.shard import Shard


class Storage(Protocol):
    """File names are those of the cache's top folder; a shard goes by its entry, or its name in `shards/`."""

    place: str
    """As the user names it."""
    disk: Path
    """The local folder, which need not exist, on whose disk shards are when they are read."""
    repair: str
    """What to do about damage that a reader finds."""
    fleeting: bool
    """Whether shards are copies that may be dropped: `shard` is then to be asked before each use, else once."""

    def names(self) -> list[str]:
        """What the top folder holds; nothing where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """The file holds all of `data` or what it held before."""
        ...

    def delete(self, name: str) -> None: ...

    def lock(self, name: str = LOCK, *, wait: bool = False) -> AbstractContextManager[None]:
        """To be held while writing. wait: for another process to let go of it, where it holds it for a moment.

        Raises:
            CacheError: another process writes there.
        """
        ...

    def room(self) -> int | None:
        """Free bytes; None where nobody knows."""
        ...

    def faults(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
        """Of these shards those that are not as listed, by their names. Rows are for `verify` to look at."""
        ...

    def draft(self, file: str) -> Path:
        """Where a `ShardWriter` is to write the shard: under the lock, or for a process that holds it."""
        ...

    def add(self, file: str, path: Path) -> None:
        """The finished shard at `path` is in the store when this returns. Gone from `path` if it was a draft."""
        ...

    def look(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        """The shard as it is in the store now; nothing is at the path where it is missing."""
        ...

    def file(self, name: str, checksum: str) -> Path:
        """A file beside the shards, to be read soon. What a remote store has is held against the checksum."""
        ...

    def shard(self, entry: ShardEntry) -> Path:
        """A shard, to be read. What a remote store has is held against the entry."""
        ...

    def renewed(self) -> Collection[Path]:
        """Paths that are not, or no longer, the files that they were when `shard` gave them; each is told once."""
        ...


class LocalStorage:
    """A folder."""

    fleeting = False

    def __init__(self, folder: Path) -> None:
        self.disk, self.place, self.repair = folder, str(folder), repair_hint(folder)

    def names(self) -> list[str]:
        return [path.name for path in self.disk.iterdir()] if self.disk.is_dir() else []

    def read(self, name: str) -> bytes:
        return (self.disk / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.disk / name, data)

    def delete(self, name: str) -> None:
        (self.disk / name).unlink()
        sync_folder(self.disk)

    @contextmanager
    def lock(self, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
        new = not self.disk.exists()
        self.disk.mkdir(parents=True, exist_ok=True)
        try:
            with write_lock(self.disk, name, wait=wait):
                yield
        finally:
            if new:
                with suppress(OSError):  # unless it was made for nothing
                    self.disk.rmdir()

    def room(self) -> int | None:
        return shutil.disk_usage(self.disk).free

    def faults(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
        found: dict[str, CacheError] = {}
        for entry in entries:
            try:
                Shard.open(self.shard(entry)).require_listed(entry.bytes, entry.checksum)
            except CacheError as error:
                found[entry.file] = error
        return found

    def draft(self, file: str) -> Path:
        (self.disk / SHARDS).mkdir(exist_ok=True)
        return self.disk / SHARDS / file

    def add(self, file: str, path: Path) -> None:
        target = self.disk / SHARDS / file
        if path == target:
            return
        temporary = self.draft(f"{file}.partial")
        try:
            shutil.copyfile(path, temporary)
            sync_file(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    def look(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        return nullcontext(self.shard(entry))

    def file(self, name: str, checksum: str) -> Path:
        return self.disk / name

    def shard(self, entry: ShardEntry) -> Path:
        return self.disk / SHARDS / entry.file

    def renewed(self) -> Collection[Path]:
        return ()


def storage_at(place: Location) -> Storage:
    """
    Raises:
        UsageError: a URL that no installed package reaches.
    """
    place = location(place) if isinstance(place, str) else place
    if isinstance(place, Path):
        return LocalStorage(place)
    from imagewam_cli.kvcache.remote import RemoteStorage

    return RemoteStorage(place)


def read_manifest(place: Location) -> Manifest:
    """The manifest of a cache; together with those of its parts that were not merged yet.

    Raises:
        CacheError: no cache, a newer version, damaged, a name that leaves the folder, or parts of different caches.
        UsageError: a URL that no installed package reaches.
    """
    return manifest_at(storage_at(place))


def manifest_at(storage: Storage) -> Manifest:
    """As `read_manifest`."""
    found = manifests_at(storage) or manifests_at(storage)  # what was listed may have been merged meanwhile
    if not found:
        raise no_cache(storage.place)
    return unite([(f"{storage.place}/{name}", manifest) for name, manifest in found])


def manifests_at(storage: Storage) -> list[tuple[str, Manifest]]:
    """The whole's, where there is one, and those of parts."""
    found = []
    for name in manifest_names(storage.names()):
        with suppress(FileNotFoundError, IsADirectoryError):
            found.append((name, parse_manifest(storage.read(name), f"{storage.place}/{name}")))
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
        return xxhash.xxh3_128_hexdigest(storage.read(name)) == checksum
    except (FileNotFoundError, IsADirectoryError):
        return False

"""Storage in a local folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from imagewam_cli.errors import CacheError
from imagewam_cli.files import atomic_file, partial_of, sync_folder, write_atomically
from imagewam_cli.kvcache.format.manifest import SHARDS, ShardEntry, repair_hint
from imagewam_cli.kvcache.format.shard import Shard
from imagewam_cli.lock import LOCK, write_lock


class LocalStorage:
    """A cache in a folder; see `Storage`."""

    evictable = False

    def __init__(self, folder: Path) -> None:
        self.disk, self.address, self.repair = folder, str(folder), repair_hint(folder)

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
                with suppress(OSError):  # still empty: nothing was built
                    self.disk.rmdir()

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.disk).free

    def damaged_shards(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
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
        with atomic_file(target, partial=partial_of(target)) as temporary:
            shutil.copyfile(path, temporary)

    def open_current(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        return nullcontext(self.shard(entry))

    def file(self, name: str, checksum: str) -> Path:
        return self.disk / name

    def shard(self, entry: ShardEntry) -> Path:
        return self.disk / SHARDS / entry.file

    def evicted(self) -> Collection[Path]:
        return ()

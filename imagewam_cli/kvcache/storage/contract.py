"""Where a cache lies, as its writers and readers need it: a folder, or a remote store (`kvcache.remote`).

Shards are written and read as local files. A folder holds them itself; a remote store takes finished ones in, and gives
out copies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.manifest import (
    ShardEntry,
)
from imagewam_cli.kvcache.storage.lock import LOCK


class Storage(Protocol):
    """File names are those of the cache's top folder; a shard goes by its entry, or its name in `shards/`."""

    address: str
    """As the user names it."""
    disk: Path
    """The local folder, which need not exist, on whose disk shards are when they are read."""
    repair: str
    """What to do about damage that a reader finds."""
    evictable: bool
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

    def free_bytes(self) -> int | None:
        """Free bytes; None where nobody knows."""
        ...

    def damaged_shards(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
        """Of these shards those that are not as listed, by their names. Rows are for `verify` to look at."""
        ...

    def draft(self, file: str) -> Path:
        """Where a `ShardWriter` is to write the shard: under the lock, or for a process that holds it."""
        ...

    def add(self, file: str, path: Path) -> None:
        """The finished shard at `path` is in the store when this returns. Gone from `path` if it was a draft."""
        ...

    def open_current(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        """The shard as it is in the store now; nothing is at the path where it is missing."""
        ...

    def file(self, name: str, checksum: str) -> Path:
        """A file beside the shards, to be read soon. What a remote store has is held against the checksum."""
        ...

    def shard(self, entry: ShardEntry) -> Path:
        """A shard, to be read. What a remote store has is held against the entry."""
        ...

    def evicted(self) -> Collection[Path]:
        """Paths that are not, or no longer, the files that they were when `shard` gave them; each is told once."""
        ...

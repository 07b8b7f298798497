"""The contract of a storage: a local folder (`local`) or a remote store (`remote`).

Shards are always written and read as local files. A folder stores them directly; a remote store uploads finished shards
and downloads copies.
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
from imagewam_cli.lock import LOCK


class Storage(Protocol):
    """Access to the files of one cache. Names refer to its top folder; shards are named by their entry or file name."""

    address: str
    """Folder or URL, as the user gave it."""
    disk: Path
    """Local folder on the disk that shards are read from. It need not exist."""
    repair: str
    """Hint for errors about damaged files."""
    evictable: bool
    """True if shards are local copies that may be evicted. If True, call `shard` before each use; otherwise one call is
    enough."""

    def names(self) -> list[str]:
        """List the files in the top folder; empty if the folder does not exist."""
        ...

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a file atomically: afterwards it has its old or its new content, never a mixture."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file."""
        ...

    def lock(self, name: str = LOCK, *, wait: bool = False) -> AbstractContextManager[None]:
        """Hold a lock while writing. wait: block until another process releases it instead of raising.

        Raises:
            CacheError: another process holds it.
        """
        ...

    def free_bytes(self) -> int | None:
        """Return the free bytes, or None if unknown."""
        ...

    def damaged_shards(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
        """Return an error for each shard that does not match its entry, by file name. Rows are not checked."""
        ...

    def draft(self, file: str) -> Path:
        """Return the path for a `ShardWriter` to write a shard. The caller, or its parent process, holds the lock."""
        ...

    def add(self, file: str, path: Path) -> None:
        """Store the finished shard at `path`. A draft is removed from `path`."""
        ...

    def open_current(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        """Provide the shard as it is stored now, bypassing local copies. If it is missing, the path does not exist."""
        ...

    def file(self, name: str, checksum: str) -> Path:
        """Return the path of a file other than the shards. Downloads are verified against the checksum."""
        ...

    def shard(self, entry: ShardEntry) -> Path:
        """Return the path of a shard. Downloads are verified against the entry."""
        ...

    def evicted(self) -> Collection[Path]:
        """Return paths evicted or replaced since `shard()` returned them. Each is reported once."""
        ...

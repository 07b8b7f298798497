"""Local copies of files of remote caches, in the user's cache folder.

The name of a copy contains the checksum from the manifest, so old copies are never used for a rebuilt cache. Each
copy appears by a rename, so several processes may download the same file at once. If a limit is set, the least recently
used copies are evicted first.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagewam_cli.config import size_in_bytes
from imagewam_cli.files import PARTIAL, atomic_file, expanded, unique_partial, user_cache_folder

FOLDER_VARIABLE, LIMIT_VARIABLE = "IMAGEWAM_CACHE_DIR", "IMAGEWAM_CACHE_LIMIT"
_COPIES = "copies"
_STALE_SECONDS = 24 * 3600.0
"""Seconds after which an unfinished download is assumed to belong to a dead process."""


def copies_root() -> Path:
    """Return the folder for copies of all remote caches: IMAGEWAM_CACHE_DIR, or one in the user's cache folder.

    Without a home folder that can be written, it is one of this user in the folder for temporary files.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return expanded(named)
    folder = user_cache_folder() or Path(tempfile.gettempdir()) / f"cache-{os.getuid()}" / "imagewam"
    return folder / "caches"


def copies_limit() -> float | None:
    """Return the byte limit for all copies together (IMAGEWAM_CACHE_LIMIT, such as 50GB), or None.

    Raises:
        ConfigError: the variable is not a size.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    return size_in_bytes(text, LIMIT_VARIABLE) if text else None


class DownloadCache:
    """Copies of one remote cache. The limit applies to the copies of all caches together."""

    def __init__(self, root: Path, name: str, limit: float | None) -> None:
        """name: folder of this cache in `root`."""
        self.root, self.folder, self.limit = root, root / name / _COPIES, limit
        self._evicted: set[Path] = set()

    def get(self, name: str, checksum: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """Return the path of a copy, downloading it if missing.

        fetch: writes the file to the path that it is given and verifies it, or raises.
        """
        path = self.folder / f"{checksum}-{name}"
        with suppress(FileNotFoundError):
            _used_now(path)
            return path
        self._make_room(size)
        with atomic_file(path, partial=unique_partial(self.folder / name), durable=False) as fresh:
            fetch(fresh)
            _used_now(fresh)
        self._evicted.add(path)
        return path

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """Provide a unique path on the same disk; a file left there is deleted at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = unique_partial(self.folder / name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def evicted(self) -> Collection[Path]:
        """Return the copies that were downloaded or evicted since the last call."""
        found, self._evicted = self._evicted, set()
        return found

    def _make_room(self, size: int) -> None:
        """Evict the least recently used copies until `size` more bytes fit the limit, or none is left."""
        copies = []
        for path in self.root.glob(f"*/{_COPIES}/*"):
            with suppress(FileNotFoundError):  # evicted by another process
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
        total = size + sum(copied for _, copied, _ in copies)
        for used, copied, path in sorted(copies):
            dead = path.suffix == PARTIAL and used < time.time() - _STALE_SECONDS
            if dead or (self.limit is not None and total > self.limit and path.suffix != PARTIAL):
                path.unlink(missing_ok=True)
                self._evicted.add(path)
                total -= copied


def _used_now(path: Path) -> None:
    """Set the time of last use from the precise clock: the file system's clock advances only every few milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))

"""Local copies of files of remote caches, in the user's cache folder.

A copy is named by the checksum that a manifest gives it, so a cache that grew or was built again never meets copies of
what it was. It comes by a rename, so that processes may fetch the same file at once. Where a limit is set, copies that
were not used for longest go first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagewam_cli.config import size_in_bytes
from imagewam_cli.files import PARTIAL, atomic_file, unique_partial

FOLDER_VARIABLE, LIMIT_VARIABLE = "IMAGEWAM_CACHE_DIR", "IMAGEWAM_CACHE_LIMIT"
_COPIES = "copies"
_STALE = 24 * 3600.0
"""Seconds after which a half-fetched file is taken for a dead process's."""


def copies_root() -> Path:
    """The folder of all remote caches' copies: IMAGEWAM_CACHE_DIR, or in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "imagewam" / "caches"


def copies_limit() -> float | None:
    """Bytes that all copies together may take: IMAGEWAM_CACHE_LIMIT, as 50GB; None: no limit.

    Raises:
        ConfigError: not a size.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    return size_in_bytes(text, LIMIT_VARIABLE) if text else None


class Copies:
    """The copies of one remote cache, within the limit of all."""

    def __init__(self, root: Path, name: str, limit: float | None) -> None:
        """name: the cache's folder in `root`."""
        self.root, self.folder, self.limit = root, root / name / _COPIES, limit
        self._evicted: set[Path] = set()

    def get(self, name: str, checksum: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The copy, made by `fetch` where there is none: that writes the file at the path and checks it, or raises."""
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
        """A path of nobody else's, on the same disk; what is there at the end is deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = unique_partial(self.folder / name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def evicted(self) -> Collection[Path]:
        """Copies that were made or dropped since this was last asked for."""
        found, self._evicted = self._evicted, set()
        return found

    def _make_room(self, size: int) -> None:
        """Drop what was not used for longest until `size` bytes more are within the limit, or nothing is left."""
        copies = []
        for path in self.root.glob(f"*/{_COPIES}/*"):
            with suppress(FileNotFoundError):  # dropped by another process
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
        total = size + sum(copied for _, copied, _ in copies)
        for used, copied, path in sorted(copies):
            dead = path.suffix == PARTIAL and used < time.time() - _STALE
            if dead or (self.limit is not None and total > self.limit and path.suffix != PARTIAL):
                path.unlink(missing_ok=True)
                self._evicted.add(path)
                total -= copied


def _used_now(path: Path) -> None:
    """By the fine clock: that of file systems ticks every few milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))

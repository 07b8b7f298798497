"""SHA-256 of large files, computed once: remembered by path, size and times in the user's cache folder.

A file whose content changes gets another time, so it is read again. So is a file that was written within the last
seconds, because a second write may get the same time. Without a home folder, or if it cannot be written, nothing is
remembered.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from imagewam_cli.files import sha256_of, unique_partial, user_cache_folder

_LARGE = 2**24
"""Files below this size in bytes are read again every time: it takes milliseconds."""
_SETTLED_SECONDS = 5.0
"""Age of the last change from which on the times of a file are trusted."""


@dataclass(frozen=True)
class FileState:
    """What the file system says about a file. Times are in nanoseconds."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of the file that a link points to."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    real = path.resolve()
    state = FileState.of(real)
    if state.size < _LARGE:
        return sha256_of(real)
    store = _store()
    known = _read(store).get(str(real))
    if known is not None and known[:-1] == list(astuple(state)):
        return str(known[-1])
    found = sha256_of(real)
    settled = time.time_ns() - max(state.modified, state.changed) > _SETTLED_SECONDS * 1e9
    if settled and FileState.of(real) == state:
        _remember(store, str(real), [*astuple(state), found])
    return found


def _store() -> Path | None:
    """Return the file that remembers checksums; None without a home folder."""
    folder = user_cache_folder()
    return None if folder is None else folder / "checksums.json"


def _read(store: Path | None) -> dict[str, list[object]]:
    """Return path -> [size, times, inode, SHA-256]; empty if there are none, or they are damaged."""
    try:
        values = json.loads(store.read_bytes()) if store is not None else {}
    except (OSError, ValueError):
        return {}
    entries = values.items() if isinstance(values, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 5}


def _remember(store: Path | None, path: str, entry: list[object]) -> None:
    """Add an entry, and drop those of files that are gone. A failure only costs time later."""
    if store is None:
        return
    kept = {name: known for name, known in _read(store).items() if os.path.exists(name)} | {path: entry}
    temporary = unique_partial(store)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(store)
    except OSError:
        with suppress(OSError):
            temporary.unlink()

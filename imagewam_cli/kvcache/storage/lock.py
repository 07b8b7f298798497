"""One writer at a time. The operating system holds the lock for a process and lets it go when the process ends, however
it ends: what a dead writer left in the file does not lock anybody out."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagewam_cli.errors import CacheError

LOCK = ".lock"
FILES_LOCK = f"{LOCK}.files"
"""Of the files that all parts of a cache have in common; held for a moment."""


def part_lock(manifest: str) -> str:
    """The lock of who builds the part of a cache that this manifest lists."""
    return f"{LOCK}.{manifest}"


@contextmanager
def write_lock(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder for writing. wait: for another process to let go of it, where it holds it for a moment.

    Raises:
        CacheError: another process writes there; says which.
    """
    path = folder / name
    descriptor = _locked(path, wait)
    try:
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # another process may have made it, and removed it, for nothing
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise CacheError(f"{path.parent} is being written by {holder}", "wait for it to end") from None
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise CacheError(f"{path.parent} cannot be locked: {error.strerror}", "build on another disk") from None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last holder deleted this file while it was being opened: lock the new one


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""Locks for writers of a folder, such as a cache or a run: one process at a time.

The operating system releases a lock when its process ends, however it ends. A lock file left by a dead writer
does not block anyone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagewam_cli.errors import CacheError, ImagewamError

LOCK = ".lock"
FILES_LOCK = f"{LOCK}.files"
"""Lock for the files that all parts of a cache share."""


def part_lock(manifest: str) -> str:
    """Return the name of the lock for building the part that this manifest lists."""
    return f"{LOCK}.{manifest}"


@contextmanager
def write_lock(
    folder: Path,
    name: str = LOCK,
    *,
    wait: bool = False,
    error: type[ImagewamError] = CacheError,
    hint: str = "wait for it to end",
) -> Iterator[None]:
    """Hold a lock on the folder. A folder that does not exist is created, and removed at the end if it is empty.

    wait: block until another process releases the lock instead of raising. error, hint: class and hint of the error.

    Raises:
        ImagewamError: another process holds it; the message names the process.
    """
    path, created = folder / name, not folder.exists()
    descriptor = _locked(path, wait, error, hint)
    try:
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if created:
            with suppress(OSError):  # it holds files
                folder.rmdir()


def _locked(path: Path, wait: bool, error: type[ImagewamError], hint: str) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise error(f"{path.parent} is being written by {holder}", hint) from None
        except OSError as failure:  # a file system without locks
            os.close(descriptor)
            raise error(f"{path.parent} cannot be locked: {failure.strerror}", "use a folder on another disk") from None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the last holder deleted it meanwhile: try again with the new file


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

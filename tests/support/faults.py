"""Inject faults into tests: Ctrl-C after some work, a flipped bit, a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 146946961\n"
"""Content of a file whose data Git LFS did not fetch."""


def stop_after(rows: int) -> Callable[[int], None]:
    """Return an `on_rows` callback that raises KeyboardInterrupt once `rows` rows are done."""
    done = 0

    def on_rows(count: int) -> None:
        nonlocal done
        done += count
        if done >= rows:
            raise KeyboardInterrupt

    return on_rows


def stop_at(step: int) -> Callable[[int, dict[str, float]], None]:
    """Return an `on_step` callback that raises KeyboardInterrupt after training step `step`."""

    def on_step(done: int, values: dict[str, float]) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of the byte at `offset`."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def out_of_space(descriptor: int) -> None:
    """Fail like `os.fsync` on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

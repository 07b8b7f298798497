"""Test `lock`: one writer at a time, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagewam_cli.errors import CacheError
from imagewam_cli.lock import LOCK, write_lock

_HOLD = """
import sys, time
from pathlib import Path
from imagewam_cli.lock import write_lock
with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    process = holding(tmp_path)
    try:
        with pytest.raises(CacheError, match=f"being written by process {process.pid} on "), write_lock(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    finally:
        process.kill()
        process.wait()


def test_the_lock_file_of_a_killed_writer_does_not_block_others(tmp_path: Path) -> None:
    process = holding(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with write_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="within"), write_lock(tmp_path):
        raise ValueError("within")
    with write_lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CacheError, match="cannot be locked: No locks available"), write_lock(tmp_path):
        pass

"""Test builds with worker processes, some of which are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.errors import CacheError, UnknownNameError
from imagewam_cli.kvcache.building.workers.processes import ProcessWorkers
from tests.support.folders import files
from tests.support.worker_jobs import Build, kill, mistype


def test_a_killed_worker_is_replaced_and_the_bytes_equal_a_single_build(
    built: Path, tmp_path: Path, job: Any, build_by: Build
) -> None:
    news: list[str] = []
    build_by(ProcessWorkers(job(times=1, happens=kill), 2, 1), on_news=news.append)
    assert files(tmp_path / "cache") == files(built)
    (line,) = news
    assert "was killed (SIGKILL) at shard-00001.safetensors" in line


def test_a_workers_error_is_raised_unchanged(tmp_path: Path, job: Any, build_by: Build) -> None:
    """Raise an error whose class takes more than a message, with its location as a note."""
    workers = ProcessWorkers(job(times=1, happens=mistype), 1, 1)
    with pytest.raises(UnknownNameError, match="unknown editor 'tinny'") as error:
        build_by(workers)
    assert error.value.hint == "did you mean 'tiny'?"
    assert error.value.choices == ["tiny"]
    assert "in mistype" in "".join(error.value.__notes__)
    assert not isinstance(error.value, CacheError)
    assert not [name for name in files(tmp_path / "cache") if name.endswith((".partial", ".lock"))]

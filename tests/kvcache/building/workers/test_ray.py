"""Test builds on a Ray cluster on this machine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.building.workers.ray import RayWorkers, _options
from tests.support.folders import files
from tests.support.paths import ROOT
from tests.support.worker_jobs import Build, kill


def test_a_killed_actor_is_replaced_and_the_bytes_equal_a_single_build(
    built: Path, tmp_path: Path, job: Any, build_by: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # so that actors can import the job
    news: list[str] = []
    build_by(RayWorkers(job(times=1, happens=kill), count=2, threads=1), on_news=news.append)
    assert files(tmp_path / "cache") == files(built)
    (line,) = news
    assert "was lost" in line
    assert "shard-00001.safetensors" in line
    assert not ray.is_initialized(), "the build did not shut down Ray"


def test_a_missing_cluster_is_reported_at_once(job: Any) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(CacheError, match=f"at {address}") as error:
            RayWorkers(job(), address=address)
    assert error.value.hint is not None
    assert "RAY_ADDRESS" in error.value.hint


@pytest.mark.parametrize(
    ("resources", "count", "gpus", "expected"),
    [
        ({"CPU": 8.0}, None, False, (1, 0)),
        ({"CPU": 8.0, "GPU": 4.0}, 3, False, (3, 0)),
        ({"CPU": 8.0, "GPU": 4.0}, None, True, (4, 1)),
        ({"CPU": 8.0, "GPU": 4.0}, 2, True, (2, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, 5, True, (5, 1 / 3)),
    ],
)
def test_actors_share_the_gpus(
    resources: dict[str, float], count: int | None, gpus: bool, expected: tuple[int, float]
) -> None:
    number, options = _options(resources, count, gpus=gpus, alone=True)
    assert (number, options["num_gpus"]) == expected


def test_missing_gpus_are_a_clear_error() -> None:
    with pytest.raises(UsageError, match="Ray reports no GPUs"):
        _options({"CPU": 8.0}, 2, gpus=True, alone=True)

"""Kill the two long commands with SIGKILL and resume them: the results equal those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.folders import files

PATIENCE = 300.0
"""Seconds after which a process without progress counts as hung."""

TRAINING = ("--steps", "60", "--batch", "8", "--set", "save_every=10", "--set", "log_every=1")
TRAINING += ("--set", "expert.hidden=16", "--set", "expert.horizon=8", "--set", "flow.inference_steps=2")


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start the command with one thread: the number of threads changes the order of sums, and so the last bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "imagewam_cli", "--quiet", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(*arguments: str) -> dict[str, Any]:
    """Run the command to its end and return its `--format json` output."""
    process = start(*arguments, "--format", "json")
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error.decode()
    result: dict[str, Any] = json.loads(out)
    return result


def kill_when(reached: Callable[[], bool], *arguments: str) -> None:
    """Start the command and send it SIGKILL as soon as `reached` returns true."""
    process = start(*arguments)
    deadline = time.monotonic() + PATIENCE
    try:
        while not reached():
            assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1].decode()}"
            assert time.monotonic() < deadline, "the command made no progress"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the logged metrics without the measured times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.endswith("seconds_per_step")} for record in records]


@pytest.fixture(scope="module")
def cache_command(tabletop: Path, tiny_weights: Path) -> tuple[str, ...]:
    """Options of a build with one shard for each of the five episodes."""
    inputs = ("--editor", "tiny", "--weights", str(tiny_weights), "--dataset", str(tabletop))
    return ("cache", *inputs, "--image-size", "64x64", "--batch", "2", "--shard-mb", "0.01")


@pytest.fixture(scope="module")
def undisturbed_cache(cache_command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    finish(*cache_command, "--out", str(out))
    return out


@pytest.mark.slow
def test_a_killed_cache_build_resumes_to_the_same_bytes(
    cache_command: tuple[str, ...], undisturbed_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    kill_when(lambda: any(out.glob("shards/*.safetensors")), *cache_command, "--out", str(out))
    assert len(list(out.glob("shards/*.safetensors"))) < 5

    result = finish(*cache_command, "--out", str(out))

    assert result["shards"] == 5
    assert files(out) == files(undisturbed_cache)


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_numbers(undisturbed_cache: Path, tmp_path: Path) -> None:
    command = ("train-expert", "--cache", str(undisturbed_cache), *TRAINING)
    run, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    kill_when(lambda: any(run.glob("checkpoints/step-*")), *command, "--out", str(run))
    assert not (run / "result.json").exists()

    result, expected = (finish(*command, "--out", str(folder)) for folder in (run, undisturbed))

    assert result | {"run": None} == expected | {"run": None}
    assert (run / "result.json").read_bytes() == (undisturbed / "result.json").read_bytes()
    assert metrics(run) == metrics(undisturbed)
    assert [record["step"] for record in metrics(run)] == list(range(1, 61))
    assert files(run / "policy") == files(undisturbed / "policy")

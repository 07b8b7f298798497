"""`imagewam cache --workers`, and parts assigned by SLURM and torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from imagewam_cli.cli.app import run
from tests.support.folders import files

INTERRUPTIBLE = """
import signal
from imagewam_cli.cli.app import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a child process inherits an ignored SIGINT
main()
"""
FEW = ["--stride", "40", "--layers", "0", "--image-size", "64x64"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads, because --threads changes it for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def left_of(group: int) -> list[str]:
    """Return the commands of a process group that still run. Waits up to 5 s: multiprocessing's tracker ends late."""
    until = time.monotonic() + 5
    while True:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(" ".join(process.cmdline()))
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


@pytest.mark.slow
def test_two_workers_resumed_after_ctrl_c_build_the_same_cache_as_one(
    tabletop: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--image-size", "64x64", "--stride", "2"]
    command = ["-q", "cache", *options, "--codec", "pca1", "--batch", "4", "--shard-mb", "0.02", "--threads", "1"]
    out = tmp_path / "cache"
    started = [sys.executable, "-c", INTERRUPTIBLE, *command, "--out", str(out), "--workers", "2"]
    for _ in range(5):  # on a busy machine the build may be done before it is stopped
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(started, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
            until = time.monotonic() + 60
            while not (out / "manifest.json").exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 130, err
    assert err == "", "a quiet command is quiet"
    assert left_of(process.pid) == []
    assert not [name for name in files(out) if name.endswith(".partial") or ".lock" in name]
    assert run([*command, "--out", str(out), "--workers", "2"]) == 0
    assert run([*command, "--out", str(tmp_path / "single")]) == 0
    assert files(out) == files(tmp_path / "single")


def test_slurm_and_torchrun_assign_parts(
    tabletop: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), *FEW, "--shard-mb", "0.01"]
    command = ["-q", "cache", *options, "--out"]
    out = str(tmp_path / "cache")
    for environment in (
        {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"},
    ):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert run([*command, out]) == 0
    names = {path.name for path in Path(out).glob("manifest*")}
    assert names == {"manifest.part-00000-of-00002.json", "manifest.part-00001-of-00002.json"}
    assert run(["-q", "cache", "merge", out]) == 0
    assert run([*command, str(tmp_path / "single")]) == 0
    assert files(Path(out)) == files(tmp_path / "single")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0", "omit it"),
        (["--threads", "0"], "--threads must be at least 1, got 0", "omit it"),
        (["--workers", "2", "--plan"], "--workers and --engine have no effect on a plan", "omit them"),
        (["--engine", "ray", "--plan"], "--workers and --engine have no effect on a plan", "omit them"),
        (["--engine", "foo"], "'foo' is not one of 'processes', 'ray'", "Usage"),
        (["--engine", "ray"], "--engine ray needs ray, which is not installed", "pip install 'imagewam[ray]'"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tabletop: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    hint: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(["cache", "--dataset", str(tabletop), "--out", str(tmp_path / "cache"), *options]) == 2
    problem, advice = capsys.readouterr().err.strip().splitlines()
    assert message in problem
    assert hint in advice
    assert list(tmp_path.iterdir()) == []

"""Test `training.run_folder`: one process trains into a folder, and a refused one changes nothing there."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagewam_cli.errors import RunError, UsageError
from imagewam_cli.lock import LOCK
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.training.run_folder import delete_run, require_unlocked
from tests.support.folders import files

_HOLD = """
import sys, time
from pathlib import Path
from imagewam_cli.training.run_folder import locked_run
with locked_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(cache: Path, recipe: TrainRecipe, tmp_path: Path) -> Path:
    """A finished run of two steps."""
    Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, steps=2)).train(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def trainer(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in the folder of `run`."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_is_refused_and_changes_nothing(
    cache: Path, recipe: TrainRecipe, run: Path, trainer: subprocess.Popen[str], fresh: bool
) -> None:
    before = files(run)
    with pytest.raises(RunError, match=f"is being written by process {trainer.pid} on ") as error:
        Trainer(CachedPrefixes(cache), recipe).train(run, fresh=fresh)
    assert error.value.exit_code == 1
    assert error.value.hint == "wait for it to end, or choose another folder with --out"
    with pytest.raises(RunError, match="is being written by"):
        require_unlocked(run)
    assert files(run) == before


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_the_hint_names_the_launcher_that_started_several_processes(
    run: Path, trainer: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RunError) as error:
        require_unlocked(run)
    assert error.value.hint == f"training runs in one process, so start it once: {variable} is 2"


def test_the_lock_of_a_killed_process_does_not_block(
    cache: Path, recipe: TrainRecipe, run: Path, trainer: subprocess.Popen[str]
) -> None:
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert (run / LOCK).exists()
    require_unlocked(run)
    Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, steps=2)).train(run)
    assert not (run / LOCK).exists()


def test_starting_over_keeps_the_files_of_others(cache: Path, recipe: TrainRecipe, run: Path) -> None:
    (run / "eval" / "tabletop").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    seeded = dataclasses.replace(recipe, steps=1, seed=5)
    Trainer(CachedPrefixes(cache), seeded).train(run, fresh=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "eval").exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]


def test_a_folder_that_is_not_a_run_is_neither_deleted_nor_trained_in(
    cache: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a run, so --fresh does not delete it"):
        delete_run(tmp_path)
    for fresh in (False, True):
        with pytest.raises(UsageError, match="is not a run"):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path, fresh=fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]

"""Test `training.run_folder`: one process at a time, extensions, the recorded split, and starting over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.config import load_yaml
from imagewam_cli.data.splits import Split, split_episodes
from imagewam_cli.errors import ImagewamWarning, RunError, UsageError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.lock import LOCK
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.metrics import read_metrics
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.training.run_folder import delete_run, open_record, require_unlocked
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import stop_at
from tests.support.folders import files
from tests.support.runs import EPISODES, LENGTH, result_of

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


def continued(cache: Path, recipe: TrainRecipe, folder: Path) -> None:
    Trainer(CachedPrefixes(cache), recipe).train(folder)


def rates(run: Path) -> dict[int, float]:
    return {int(r["step"]): r["learning_rate"] for r in read_metrics(run / "metrics.jsonl")}


class TestExtension:
    def test_more_steps_continue_from_the_last_checkpoint(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        """Steps 7 to 12 follow the cosine over 12 steps; the first six keep theirs. Everything else is the same."""
        run, short = tmp_path / "run", dataclasses.replace(recipe, steps=6)
        continued(cache, short, run)
        with pytest.warns(ImagewamWarning, match="is extended from 6 to 12 steps: from step 6 on, the learning rate"):
            continued(cache, recipe, run)
        marker = json.loads((run / "run.json").read_text())
        assert marker["extensions"] == [{"at_step": 6, "from_steps": 6, "to_steps": 12}]
        assert load_yaml(run / "config.yaml", TrainRecipe) == recipe
        assert json.loads((run / "result.json").read_text())["steps"] == 12
        expected = {n: (short if n <= 6 else recipe).learning_rate(n - 1) for n in range(1, 13)}
        assert rates(run) == expected

    def test_an_extended_run_that_is_stopped_resumes_to_the_same_bits(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        """Also if the checkpoint from which it was extended is damaged, so that it goes on from the one before."""
        runs = {}
        for name in ("undisturbed", "stopped", "damaged"):
            run = runs[name] = tmp_path / name
            continued(cache, dataclasses.replace(recipe, steps=6), run)
            stop = stop_at(8) if name != "undisturbed" else (lambda step, values: None)
            with (
                pytest.warns(ImagewamWarning, match="is extended"),
                contextlib.suppress(KeyboardInterrupt),
            ):
                Trainer(CachedPrefixes(cache), recipe).train(run, on_step=stop)
            if name == "damaged":
                (run / "checkpoints" / "step-000006" / "model.safetensors").write_bytes(b"")
                with pytest.warns(ImagewamWarning, match="step-000006 is damaged"):
                    continued(cache, recipe, run)
            continued(cache, recipe, run)
        results = {name: result_of(run) for name, run in runs.items()}
        assert results["stopped"] == results["undisturbed"]
        numbers = {name: found["metrics"][-1]["loss"] for name, found in results.items()}
        assert numbers["damaged"] == numbers["undisturbed"]

    def test_an_unfinished_extended_run_has_no_result(self, cache: Path, recipe: TrainRecipe, tmp_path: Path) -> None:
        continued(cache, dataclasses.replace(recipe, steps=2), tmp_path)
        with pytest.warns(ImagewamWarning, match="is extended"), pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path, on_step=stop_at(4))
        assert not (tmp_path / "result.json").exists()

    def test_a_run_extended_twice_keeps_both_extensions(self, cache: Path, recipe: TrainRecipe, tmp_path: Path) -> None:
        for steps in (2, 4, 6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ImagewamWarning)
                continued(cache, dataclasses.replace(recipe, steps=steps), tmp_path)
        expected = {n: dataclasses.replace(recipe, steps=n + n % 2).learning_rate(n - 1) for n in range(1, 7)}
        assert rates(tmp_path) == expected

    @pytest.mark.parametrize("key", ["log_every", "save_every", "validate_every"])
    def test_keys_that_change_no_number_may_change(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path, key: str
    ) -> None:
        continued(cache, recipe, tmp_path / "as-planned")
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path / "run", on_step=stop_at(7))
        other = dataclasses.replace(recipe, **{key: 3})
        continued(cache, other, tmp_path / "run")
        assert load_yaml(tmp_path / "run" / "config.yaml", TrainRecipe) == other
        for name in ("policy/expert.safetensors", "checkpoints/step-000012/model.safetensors", "result.json"):
            assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "as-planned" / name).read_bytes()


class TestSplit:
    def test_the_split_is_recorded(self, cache: Path, recipe: TrainRecipe, run: Path) -> None:
        data = Trainer(CachedPrefixes(cache), recipe).data
        record = open_record(run, dataclasses.replace(recipe, steps=2))
        assert record.split == data.split
        assert set(data.split.train) | set(data.split.validation) == set(range(EPISODES))

    def test_a_resumed_run_keeps_its_split_and_an_older_one_the_rule_of_its_time(
        self, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        """Episode 4 is first in the order of seed 0 and the only one of its instruction: only the old rule takes it."""
        dataset = MemoryDataset([LENGTH] * EPISODES, instructions=("lift", "lift", "lift", "lift", "turn", "lift"))
        build_cache(dataset, ArithmeticEditor(), tmp_path / "cache", FLOAT32, BuildSettings())
        assert split_episodes(range(EPISODES), 0.2, 0)[1] == (4,)
        one = dataclasses.replace(recipe, steps=1)
        trainer = Trainer(CachedPrefixes(tmp_path / "cache"), one)
        trainer.train(tmp_path / "run")
        kept = trainer.data.split
        assert 4 in kept.train
        marker = tmp_path / "run" / "run.json"
        values = json.loads(marker.read_text())
        marker.write_text(json.dumps({**values, "split": {"train": "0,1", "validation": "2-5"}}))
        trainer.train(tmp_path / "run")
        assert trainer.data.split == Split(train=(0, 1), validation=(2, 3, 4, 5))
        del values["split"]
        marker.write_text(json.dumps(values))
        trainer.train(tmp_path / "run")
        assert trainer.data.split.validation == (4,)
        trainer.train(tmp_path / "another")
        assert trainer.data.split == kept

    def test_a_damaged_split_is_named(self, cache: Path, recipe: TrainRecipe, run: Path) -> None:
        marker = run / "run.json"
        values = json.loads(marker.read_text())
        for split in (3, {"train": "0-"}, {"train": "1", "validation": 2}):
            marker.write_text(json.dumps({**values, "split": split}))
            with pytest.raises(RunError, match=r"run\.json is damaged"):
                continued(cache, dataclasses.replace(recipe, steps=2), run)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"episodes": 1}, "first 1 training episodes have 1 of the 3 instructions, and not "),
            ({"episodes": 50}, "asks for 50 training episodes, but there are only 5"),
            ({"validation_fraction": 0.9}, "3 of 6 episodes are held out for validation, fewer than "),
        ],
    )
    def test_a_split_that_leaves_something_out_is_warned_of(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        with pytest.warns(ImagewamWarning, match=message):
            continued(cache, dataclasses.replace(recipe, steps=1, **change), tmp_path / "run")

    def test_a_validation_that_must_take_the_only_episode_of_an_instruction_says_so(
        self, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        dataset = MemoryDataset([LENGTH] * 3, instructions=("lift", "turn", "push"))
        build_cache(dataset, ArithmeticEditor(), tmp_path / "cache", FLOAT32, BuildSettings())
        with pytest.warns(ImagewamWarning, match="takes the only episode of 1 of the 3 instructions, such as episode"):
            continued(tmp_path / "cache", dataclasses.replace(recipe, steps=1), tmp_path / "run")


def test_a_run_keeps_the_normalizers_that_its_weights_were_trained_with(
    cache: Path, recipe: TrainRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    continued(cache, dataclasses.replace(recipe, steps=6), run)
    older = json.loads((run / "policy" / "normalization.json").read_text())
    older["state"]["stats"]["max"][0] += 1.0
    (run / "policy" / "normalization.json").write_text(json.dumps(older))
    with pytest.warns(ImagewamWarning, match="goes on with its own normalizers"):
        continued(cache, recipe, run)
    assert json.loads((run / "policy" / "normalization.json").read_text()) == older

"""Test which episodes of a dataset a run did not train on, and when that is unknown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from imagewam_cli.data.augmentation import Augmentation
from imagewam_cli.data.episodes import EpisodeSelection, SelectedDataset
from imagewam_cli.data.splits import split_episodes
from imagewam_cli.errors import DatasetError, RunError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.bundle import TRAINING, TrainingRecord, find_bundle, read_bundle
from imagewam_cli.training.held_out import exposure, held_out_episodes
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.runs import EPISODES, LENGTH


class Loaded(ChunkPolicy):
    """The record of a policy folder, as a loaded policy has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def training(self) -> TrainingRecord | None:
        return read_bundle(find_bundle(self.folder)).training

    def chunks(self, observations: object) -> NoReturn:
        raise NotImplementedError


def held_out(folder: Path, dataset: MemoryDataset) -> tuple[int, ...]:
    return held_out_episodes(Loaded(folder), dataset)


def older(policy: Path) -> Path:
    """Make a policy one of an older imagewam, which recorded no split."""
    (policy / TRAINING).unlink()
    marker = policy.parent / "run.json"
    if marker.exists():
        values = json.loads(marker.read_text())
        values.pop("split")
        marker.write_text(json.dumps(values))
    return policy


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, recipe: TrainRecipe
) -> tuple[Path, tuple[int, ...], tuple[int, ...]]:
    """The policy folder, the episodes it was trained on, and the held-out episodes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer = Trainer(CachedPrefixes(cache), recipe)
    trainer.train(folder)
    return folder / "policy", tuple(trainer.data.train_episodes), tuple(trainer.data.validation_episodes)


def test_held_out_episodes_are_those_of_the_trainer(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset
) -> None:
    policy, on, kept = trained
    assert held_out(policy, dataset) == kept
    assert set(on) | set(kept) == set(range(EPISODES))
    assert kept


def test_augmented_views_do_not_change_the_held_out_episodes(
    dataset: MemoryDataset, recipe: TrainRecipe, tmp_path: Path
) -> None:
    """With three views of each frame, a run has three times the dataset's rows.

    An older run.json does not record the number of views, so its held-out episodes are unknown.
    """
    settings = BuildSettings(augmentation=Augmentation(variants=3))
    build_cache(dataset, ArithmeticEditor(), tmp_path / "cache", FLOAT32, settings)
    trainer = Trainer(CachedPrefixes(tmp_path / "cache"), dataclasses.replace(recipe, steps=1))
    trainer.train(tmp_path / "run")
    kept = held_out(tmp_path / "run" / "policy", dataset)
    assert kept == tuple(trainer.data.validation_episodes) != ()
    policy = older(tmp_path / "run" / "policy")
    assert held_out(policy, dataset) == kept
    marker = tmp_path / "run" / "run.json"
    values = {key: value for key, value in json.loads(marker.read_text()).items() if key != "variants"}
    marker.write_text(json.dumps(values))
    assert held_out(policy, dataset) == ()
    trainer.train(tmp_path / "run")  # the older run still resumes


def test_held_out_episodes_of_other_data_are_unknown(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    policy = trained[0]
    assert held_out(policy, MemoryDataset([LENGTH] * EPISODES, identity="another")) == ()
    shutil.copytree(policy, tmp_path / "policy")
    assert held_out(tmp_path / "policy", dataset) == trained[2]
    assert held_out(older(tmp_path / "policy"), dataset) == ()


def test_a_run_of_an_older_imagewam_has_the_split_of_its_time(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    run = shutil.copytree(trained[0].parent, tmp_path / "run")
    older(run / "policy")
    assert held_out(run, dataset) == split_episodes(range(EPISODES), 0.2, 0)[1]
    assert held_out(run, MemoryDataset([LENGTH] * (EPISODES + 1))) == ()  # its cache did not hold all of these
    found = exposure(Loaded(run), dataset)
    assert [found.use(e) for e in range(EPISODES)].count("trained on") == EPISODES - 1


def test_unknown_or_missing_held_out_episodes_are_an_error_with_the_reason(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    policy = Loaded(trained[0])
    other = MemoryDataset([LENGTH] * EPISODES, identity="another")
    with pytest.raises(DatasetError, match="the policy was trained on another dataset"):
        exposure(policy, other).held_out(other)
    assert exposure(policy, other).use(0) == "unknown"
    copied = older(shutil.copytree(trained[0], tmp_path / "policy"))
    with pytest.raises(DatasetError, match="does not record its training episodes"):
        exposure(Loaded(copied), dataset).held_out(dataset)
    seen = SelectedDataset(dataset, EpisodeSelection.of(trained[1][:2]))
    with pytest.raises(DatasetError, match="was trained on every chosen episode"):
        exposure(policy, seen).held_out(seen)


def test_a_damaged_run_is_named(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0].parent, run)
    older(run / "policy")
    for text in ("{", json.dumps({"dataset": "x"}), "[]"):
        (run / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            held_out(run / "policy", dataset)

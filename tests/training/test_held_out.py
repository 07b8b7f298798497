"""Test which episodes of a dataset a run did not train on, and when that is unknown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from imagewam_cli.data.augmentation import Augmentation
from imagewam_cli.errors import RunError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.training.held_out import held_out_episodes
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.runs import EPISODES, LENGTH


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
    assert held_out_episodes(policy, dataset) == kept
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
    kept = held_out_episodes(tmp_path / "run" / "policy", dataset)
    assert kept == tuple(trainer.data.validation_episodes) != ()
    marker = tmp_path / "run" / "run.json"
    older = {key: value for key, value in json.loads(marker.read_text()).items() if key != "variants"}
    marker.write_text(json.dumps(older))
    assert held_out_episodes(tmp_path / "run" / "policy", dataset) == ()
    trainer.train(tmp_path / "run")  # the older run still resumes


def test_held_out_episodes_of_other_data_are_unknown(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    policy = trained[0]
    assert held_out_episodes(policy, MemoryDataset([LENGTH] * EPISODES, identity="another")) == ()
    assert held_out_episodes(policy, MemoryDataset([LENGTH] * (EPISODES + 1))) == ()
    shutil.copytree(policy, tmp_path / "policy")
    assert held_out_episodes(tmp_path / "policy", dataset) == ()


def test_a_damaged_run_is_named(
    trained: tuple[Path, tuple[int, ...], tuple[int, ...]], dataset: MemoryDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0].parent, run)
    for text in ("{", json.dumps({"dataset": "x"}), "[]"):
        (run / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            held_out_episodes(run / "policy", dataset)

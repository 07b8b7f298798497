"""A run belongs to the bytes of its dataset: replaced files are refused and named when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.errors import ImagewamWarning, RunError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.online import OnlinePrefixes
from imagewam_cli.training.prefixes import CachedPrefixes, PrefixSource
from imagewam_cli.training.recipe import TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor
from tests.support.recordings import record, replace_video, write_v21

VIDEO = "videos/chunk-000/observation.images.top/episode_000001.mp4"
REFUSED = f"trained on other files of the dataset: {VIDEO} was replaced"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_v21(tmp_path / "set", record())


@pytest.fixture
def short(recipe: TrainRecipe) -> TrainRecipe:
    return dataclasses.replace(recipe, steps=2, batch=4, validation_fraction=0.0)


def cached(root: Path, cache: Path) -> PrefixSource:
    build_cache(open_dataset(root), ArithmeticEditor(), cache, FLOAT32, BuildSettings())
    return CachedPrefixes(cache)


def online(root: Path) -> PrefixSource:
    return OnlinePrefixes(open_dataset(root), ArithmeticEditor())


def test_a_run_is_not_resumed_on_a_cache_of_other_videos(root: Path, tmp_path: Path, short: TrainRecipe) -> None:
    Trainer(cached(root, tmp_path / "cache"), short).train(tmp_path / "run")
    replace_video(root, VIDEO, 1)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RunError, match=REFUSED) as error:
        Trainer(cached(root, tmp_path / "cache"), short).train(tmp_path / "run")
    assert "--fresh" in str(error.value.hint)


def test_an_online_run_is_not_resumed_on_other_videos(root: Path, tmp_path: Path, short: TrainRecipe) -> None:
    Trainer(online(root), short).train(tmp_path / "run")
    replace_video(root, VIDEO, 1)
    with pytest.raises(RunError, match=REFUSED):
        Trainer(online(root), short).train(tmp_path / "run")


def test_a_run_is_resumed_on_a_copy(root: Path, tmp_path: Path, short: TrainRecipe) -> None:
    Trainer(online(root), short).train(tmp_path / "run")
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    shutil.rmtree(root)
    Trainer(online(copy), short).train(tmp_path / "run")


def test_a_lost_list_still_refuses(root: Path, tmp_path: Path, short: TrainRecipe) -> None:
    Trainer(online(root), short).train(tmp_path / "run")
    (tmp_path / "run" / "dataset_files.json").unlink()
    replace_video(root, VIDEO, 1)
    with pytest.raises(RunError, match="other files of the dataset: the list of them is lost"):
        Trainer(online(root), short).train(tmp_path / "run")


def test_a_run_of_an_older_imagewam_is_resumed_with_a_warning(root: Path, tmp_path: Path, short: TrainRecipe) -> None:
    Trainer(online(root), short).train(tmp_path / "run")
    marker = tmp_path / "run" / "run.json"
    older = {k: v for k, v in json.loads(marker.read_text(encoding="utf-8")).items() if k != "content"}
    marker.write_text(json.dumps(older), encoding="utf-8")
    with pytest.warns(ImagewamWarning, match="did not record the files of the dataset"):
        Trainer(online(root), short).train(tmp_path / "run")

"""Test caches that hold several augmented views of each frame."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewam_cli.data.augmentation import NO_AUGMENTATION, Augmentation, augmented
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import plan_build
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.training.data import ExpertData
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.folders import files

THREE = dataclasses.replace(SETTINGS, augmentation=Augmentation(variants=3))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "cache"
    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), folder, FLOAT32, THREE)
    return folder


def test_rows_are_the_views_in_order(three: Path) -> None:
    reader = CacheReader(three)
    rows = list(augmented(MemoryDataset(LENGTHS).rows(stride=SETTINGS.stride), THREE.augmentation))
    plan = plan_build(MemoryDataset(LENGTHS), ArithmeticEditor().spec, FLOAT32, THREE)
    assert len(reader) == len(rows) == plan.rows == 45
    assert reader.index.variant.tolist() == [0, 1, 2] * 15
    assert reader.index.row.tolist() == [r.row for r in rows]
    expected = ArithmeticEditor().encode([r.images for r in rows], [r.instruction for r in rows])
    assert torch.equal(reader.read(np.arange(45)).layers[0].k, expected.layers[0].k)
    assert reader.manifest.dataset.augmentation == THREE.augmentation


def test_a_cache_with_other_views_is_refused_with_both_values(three: Path) -> None:
    with pytest.raises(CacheError, match=r"differs in its augmentation: .*variants=3.* this build has .*variants=1"):
        build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), three, FLOAT32, SETTINGS)


def test_repair_recomputes_the_views(three: Path, tmp_path: Path) -> None:
    before = files(three)
    (three / "shards").joinpath("shard-00001.safetensors").rename(tmp_path / "kept")
    assert repair_cache(three, verify_cache(three), MemoryDataset(LENGTHS), ArithmeticEditor()) == []
    assert files(three) == before


def test_training_uses_all_views_and_validation_only_the_recorded_one(three: Path) -> None:
    data = ExpertData(CachedPrefixes(three), TrainRecipe(batch=2, validation_fraction=0.4))
    index = data.source.index
    assert len(data.validation_rows) > 0
    assert set(index.variant[data.validation_rows]) == {0}
    assert set(index.variant[data.train_rows]) == {0, 1, 2}


def test_one_view_is_the_default() -> None:
    assert SETTINGS.augmentation == NO_AUGMENTATION
    assert NO_AUGMENTATION.variants == 1

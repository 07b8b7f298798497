"""Fixtures: a cache of six episodes of eight frames by an arithmetic editor, and a recipe of a dozen steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import ExpertRecipe, FlowRecipe, OptimizerRecipe, PolicyRecipe, TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.runs import EPISODES, LENGTH


@pytest.fixture(scope="session")
def dataset() -> MemoryDataset:
    return MemoryDataset([LENGTH] * EPISODES)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, dataset: MemoryDataset) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "arithmetic"
    build_cache(dataset, ArithmeticEditor(), folder, FLOAT32, BuildSettings(shard_mb=0.03))
    return folder


@pytest.fixture
def source(cache: Path) -> CachedPrefixes:
    return CachedPrefixes(cache)


@pytest.fixture(scope="session")
def recipe() -> TrainRecipe:
    return TrainRecipe(
        steps=12,
        batch=8,
        validation_fraction=0.2,
        precision="float32",
        log_every=1,
        validate_every=6,
        save_every=5,
        expert=ExpertRecipe(horizon=4, hidden=16),
        flow=FlowRecipe(shift=5.0, inference_steps=2, draws=2),
        optimizer=OptimizerRecipe(learning_rate=1e-2, weight_decay=0.01, clip_norm=1.0, ema=0.995),
        policy=PolicyRecipe(execute=2),
    )

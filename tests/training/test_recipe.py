"""Test `training.recipe`: the learning rate against values computed by hand, and invalid values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.config import dump_yaml, from_dict, load_yaml
from imagewam_cli.errors import ConfigError
from imagewam_cli.training.recipe import ExpertRecipe, OptimizerRecipe, TrainRecipe


@pytest.fixture
def recipe() -> TrainRecipe:
    optimizer = OptimizerRecipe(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.1)
    return TrainRecipe(steps=100, optimizer=optimizer)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),  # the first of ten steps of warm-up
        (4, 1.0),
        (9, 2.0),
        (10, 2.0),  # the cosine starts at its peak
        (55, 0.2 + 1.8 / 2),  # half of the decay
        (32.5, 0.2 + 1.8 * (2 + np.sqrt(2)) / 4),  # a quarter of the decay: cos 45 degrees
        (100, 0.2),
    ],
)
def test_the_learning_rate_warms_up_and_decays_as_a_cosine(recipe: TrainRecipe, step: Any, rate: float) -> None:
    assert recipe.learning_rate(step) == pytest.approx(rate)


def test_the_learning_rate_has_one_peak(recipe: TrainRecipe) -> None:
    rates = np.array([recipe.learning_rate(step) for step in range(100)])
    assert (np.diff(rates[:10]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert rates.min() > 0


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_learning_rate_of_a_short_run_is_always_positive(steps: int) -> None:
    recipe = TrainRecipe(steps=steps, optimizer=OptimizerRecipe(learning_rate=0.5))
    assert all(0 < recipe.learning_rate(step) <= 0.5 for step in range(steps))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"log_every": 0}, "log_every"),
        ({"validate_every": 0}, "validate_every"),
        ({"save_every": 0}, "save_every"),
        ({"seed": -1}, "seed must not be negative"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"validation_rows": -1}, "validation_rows"),
        ({"validation_fraction": 1.0}, "validation_fraction must be in [0, 1), got 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        (
            {"expert": {"horizon": 16}, "policy": {"execute": 17}},
            "policy.execute 17 must be between 1 and the horizon 16",
        ),
        ({"policy": {"execute": 0}}, "policy.execute 0"),
        ({"expert": {"horizon": 0}}, "expert.horizon must be at least 1"),
        ({"expert": {"hidden": 0}}, "expert.hidden"),
        ({"expert": {"mlp_ratio": 0}}, "expert.mlp_ratio"),
        ({"flow": {"shift": 0}}, "flow.shift must be positive"),
        ({"flow": {"inference_steps": 0}}, "flow.inference_steps must be at least 1"),
        ({"flow": {"draws": 0}}, "flow.draws must be at least 1"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be positive"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay"),
        ({"optimizer": {"clip_norm": 0}}, "optimizer.clip_norm"),
        ({"optimizer": {"ema": 1.0}}, "optimizer.ema must be in [0, 1)"),
        ({"optimizer": {"warmup_fraction": 1.5}}, "optimizer.warmup_fraction"),
        ({"normalize_action": "minmax"}, "normalize_action is 'minmax'"),
        ({"steps": "many"}, "steps must be int"),
        ({"stepz": 5}, "unknown key 'stepz'"),
        ({"expert": {"horizn": 5}}, "unknown key 'expert.horizn'"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(TrainRecipe, values, source="recipe.yaml")
    assert error.value.message.startswith("recipe.yaml: ")
    assert message in error.value.message


def test_a_recipe_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    recipe = TrainRecipe(
        steps=7, episodes=3, optimizer=OptimizerRecipe(learning_rate=1e-5), expert=ExpertRecipe(use_prefix=False)
    )
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert load_yaml(tmp_path / "recipe.yaml", TrainRecipe) == recipe

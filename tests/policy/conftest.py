"""A run of a few steps on the shared cache, and policies loaded from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Observation
from imagewam_cli.policy.policy import Policy
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import ExpertRecipe, FlowRecipe, PolicyRecipe, TrainRecipe
from tests.support.policies import EXECUTE, HORIZON, INFERENCE_STEPS


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """A trained run. It is read-only: copy it before you damage it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = TrainRecipe(
        steps=2,
        batch=4,
        validation_rows=4,
        precision="float32",
        normalize_action="min_max",
        normalize_state="min_max",
        expert=ExpertRecipe(horizon=HORIZON, hidden=16),
        flow=FlowRecipe(shift=5.0, inference_steps=INFERENCE_STEPS, draws=1),
        policy=PolicyRecipe(execute=EXECUTE, noise_seed=42),
    )
    Trainer(CachedPrefixes(tiny_cache), recipe).train(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(run: Path, tiny_weights: Path) -> Policy:
    """The run's policy with larger expert weights, so that every input has an effect on the actions."""
    policy = Policy.load(run, weights=tiny_weights)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.expert.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def policy(loaded: Policy) -> Policy:
    loaded.reset()
    return loaded


@pytest.fixture(scope="session")
def observations(tabletop: Path) -> list[Observation]:
    """The first frame of each of the five episodes, with its image, state and instruction."""
    found = [row.observation() for row in open_dataset(tabletop).rows(stride=10_000)]
    assert len({o.instruction for o in found}) > 1
    return found


@pytest.fixture
def observation(observations: list[Observation]) -> Observation:
    return dataclasses.replace(observations[0])

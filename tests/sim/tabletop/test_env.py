"""Test the gymnasium environment and the imagewam `Environment` around it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from imagewam_cli.errors import SimulationError, UnknownNameError
from imagewam_cli.sim.tabletop.env import MAX_STEPS, SIZE, TabletopEnv, TabletopEnvironment
from imagewam_cli.sim.tabletop.render import render
from imagewam_cli.sim.tabletop.scene import sample_scene
from tests.support.scenes import action


@pytest.mark.parametrize("wrist", [False, True])
def test_the_checker_of_gymnasium_passes(wrist: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(TabletopEnv("rgb_array", wrist_camera=wrist), skip_render_check=True)


def test_an_observation_has_images_and_state() -> None:
    env = TabletopEnv("rgb_array", wrist_camera=True)
    observation, info = env.reset(seed=3, options={"split": "test"})
    assert env.observation_space.contains(observation)
    assert list(observation["images"]) == ["top", "wrist"]
    assert env.world is not None
    for camera, picture in observation["images"].items():
        assert np.array_equal(picture, render(env.world, SIZE, camera))
    assert np.array_equal(env.render(), observation["images"]["top"])
    scene = sample_scene(3, "test")
    assert info == {"instruction": scene.instruction, "kind": scene.task.kind, "success": False}
    assert observation["state"].tolist() == pytest.approx([*scene.gripper, 1.0])


def test_episodes_depend_only_on_seed_split_and_actions() -> None:
    def states(seed: int, split: str) -> list[list[float]]:
        env = TabletopEnv()
        env.reset(seed=seed, options={"split": split})
        return [env.step(action(1, 1))[0]["state"].tolist() for _ in range(5)]

    assert states(1, "test") == states(1, "test")
    assert len({str(states(*scene)) for scene in ((1, "test"), (2, "test"), (1, "train"))}) == 3


def test_motor_noise_changes_the_path() -> None:
    def way(noise: float) -> np.ndarray:
        env = TabletopEnv(motor_noise=noise)
        env.reset(seed=1)
        states = [env.step(action(0, 0))[0]["state"] for _ in range(10)]
        return np.ptp(states, axis=0)

    assert way(0.0).tolist() == [0, 0, 0]
    assert way(0.15)[:2].min() > 0


def test_resets_without_a_seed_depend_on_the_first_seed() -> None:
    def instructions(seed: int) -> list[str]:
        env = TabletopEnv()
        env.reset(seed=seed)
        return [env.reset()[1]["instruction"] for _ in range(3)]

    assert instructions(1) == instructions(1) != instructions(2)


def test_an_episode_ends_after_its_maximum_of_steps() -> None:
    env = TabletopEnv()
    env.reset(seed=0)
    for step in range(1, MAX_STEPS + 1):
        _, reward, terminated, truncated, _ = env.step(action())
        assert (reward, terminated, truncated) == (0.0, False, step == MAX_STEPS)
    with pytest.raises(SimulationError, match="episode has ended"):
        env.step(action())


@pytest.mark.parametrize(
    "wrong", [np.zeros(2), np.zeros((1, 3)), np.array([0.0, np.nan, 0.0]), np.array([0, np.inf, 0])]
)
def test_an_impossible_action_is_refused(wrong: np.ndarray) -> None:
    env = TabletopEnvironment()
    env.reset(0, "test")
    with pytest.raises(SimulationError, match="three finite numbers"):
        env.step(wrong)


def test_a_step_before_reset_is_refused() -> None:
    with pytest.raises(SimulationError, match="has no scene yet"):
        TabletopEnv().step(action())


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'held-out'") as caught:
        TabletopEnvironment().reset(0, "held-out")
    assert caught.value.hint == "did you mean 'heldout'?"


@pytest.mark.parametrize("wrist", [False, True])
def test_observations_and_actions_match_the_declared_shapes(wrist: bool) -> None:
    env = TabletopEnvironment(wrist_camera=wrist)
    assert tuple(env.cameras) == (("top", "wrist") if wrist else ("top",))
    observation = env.reset(0, "heldout")
    assert {c: picture.shape[:2] for c, picture in observation.images.items()} == env.cameras
    assert observation.state.shape == (len(env.state_names),)
    assert observation.instruction == sample_scene(0, "heldout").instruction
    assert env.kind() == "place"
    assert env.demonstrate().shape == (len(env.action_names),)


def test_the_expert_reaches_success_in_the_environment() -> None:
    env = TabletopEnvironment()
    env.reset(0, "test")
    results = [env.step(env.demonstrate())]
    while not results[-1].finished:
        results.append(env.step(env.demonstrate()))
    assert [r.success for r in results] == [False] * (len(results) - 1) + [True]
    assert 25 <= len(results) < env.max_steps

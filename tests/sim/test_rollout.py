"""Test rollouts: lockstep gives the same results as one scene at a time, and baselines behave as expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.errors import SimulationError
from imagewam_cli.policy.acting import ChunkPolicy, RandomPolicy
from imagewam_cli.sim.environment import Environment
from imagewam_cli.sim.rollout import Episode, roll_out
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


class ObservingPolicy(ChunkPolicy):
    """A deterministic policy that moves towards a point computed from image, state and instruction."""

    def __init__(self, execute: int = 3) -> None:
        self.execute = execute
        self.batches: list[int] = []
        self.instructions: list[str] = []

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        self.batches.append(len(observations))
        self.instructions += [o.instruction for o in observations]
        return np.stack([self._chunk(o) for o in observations])

    def _chunk(self, observation: Observation) -> Float32Array:
        phase = float(observation.images["top"].mean()) + 7 * len(observation.instruction)
        target = 0.5 + 0.4 * np.array([np.sin(phase), np.cos(phase)])
        dx, dy = np.clip((target - observation.state[:2]) / 0.03, -1, 1)
        return np.array([[dx, dy, np.sin(phase + step)] for step in range(8)], dtype=np.float32)


def outcome(episode: Episode) -> tuple[object, ...]:
    """Return the fields of an episode that must not depend on how scenes are batched."""
    return (episode.seed, episode.split, episode.kind, episode.instruction, episode.success, episode.steps)


def test_lockstep_gives_the_same_results_as_one_scene_at_a_time() -> None:
    seeds = range(10, 14)
    together, apart = ObservingPolicy(), ObservingPolicy()
    first = roll_out(TabletopEnvironment, together, seeds, "test", max_steps=20, keep_frames=9)
    second = roll_out(TabletopEnvironment, apart, seeds, "test", max_steps=20, keep_frames=9, batch=1)
    assert [outcome(e) for e in first] == [outcome(e) for e in second]
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(np.stack(one.frames), np.stack(other.frames))
    assert together.batches == [4] * 7  # 20 steps with a new plan every 3 steps
    assert apart.batches == [1] * 28


def test_frames_are_kept_only_for_the_first_scenes() -> None:
    episodes = roll_out(TabletopEnvironment, ObservingPolicy(), range(5), "test", max_steps=3, batch=2, keep_frames=3)
    assert [len(e.frames) for e in episodes] == [4, 4, 4, 0, 0]


def test_scenes_run_in_consecutive_batches() -> None:
    policy = ObservingPolicy()
    seen: list[int] = []
    episodes = roll_out(
        TabletopEnvironment, policy, range(5), "test", max_steps=3, batch=2, on_episode=lambda e: seen.append(e.seed)
    )
    assert policy.batches == [2, 2, 1]
    assert [e.seed for e in episodes] == seen == [0, 1, 2, 3, 4]


def test_the_expert_succeeds_in_every_split() -> None:
    for split in TabletopEnvironment.splits:
        episodes = roll_out(TabletopEnvironment, None, range(5), split)
        assert all(e.success for e in episodes)
        assert all(25 <= e.steps < 100 for e in episodes)
        assert all(e.given == e.instruction for e in episodes)


def test_a_random_policy_rarely_succeeds() -> None:
    episodes = roll_out(TabletopEnvironment, RandomPolicy(3), range(10), "test")
    assert sum(e.success for e in episodes) <= 1
    assert all(e.steps == 100 for e in episodes if not e.success)


def test_the_policy_gets_the_given_instruction_instead_of_the_scenes_own() -> None:
    policy = ObservingPolicy()
    episodes = roll_out(
        TabletopEnvironment, policy, [0, 1], "test", max_steps=2, instruction_of=lambda seed: f"do task {seed}"
    )
    assert [e.given for e in episodes] == ["do task 0", "do task 1"]
    assert policy.instructions == ["do task 0", "do task 1"]
    own = [TabletopEnvironment().reset(seed, "test").instruction for seed in (0, 1)]
    assert [e.instruction for e in episodes] == own


def test_frames_are_the_first_camera_before_and_after_each_step() -> None:
    def with_wrist() -> Environment:
        return TabletopEnvironment(wrist_camera=True)

    (episode,) = roll_out(with_wrist, None, [0], "test", max_steps=4, keep_frames=9)
    env = with_wrist()
    pictures = [env.reset(0, "test").images["top"]]
    for _ in range(4):
        pictures.append(env.step(env.demonstrate()).observation.images["top"])
    assert np.array_equal(np.stack(episode.frames), np.stack(pictures))


def test_an_episode_that_reaches_the_step_limit_fails() -> None:
    (episode,) = roll_out(TabletopEnvironment, None, [0], "test", max_steps=7)
    assert (episode.steps, episode.success) == (7, False)


def test_an_environment_without_an_expert_cannot_demonstrate() -> None:
    class NoExpert(TabletopEnvironment):
        demonstrate = Environment.demonstrate

    with pytest.raises(SimulationError, match="no scripted demonstrator"):
        roll_out(NoExpert, None, [0], "test")

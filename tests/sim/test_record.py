"""Test that recorded demonstrations are read back as they were executed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.errors import SimulationError, UsageError
from imagewam_cli.sim.environment import Environment, StepResult
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


class SomeScenesUnsolved(TabletopEnvironment):
    """An environment whose demonstrator does nothing in scenes 0 and 2."""

    max_steps = 60

    def reset(self, seed: int, split: str) -> Observation:
        self.seed = seed
        return super().reset(seed, split)

    def demonstrate(self) -> Float32Array:
        return np.zeros(3, dtype=np.float32) if self.seed in (0, 2) else super().demonstrate()


def played(env: Environment, seed: int, split: str) -> tuple[list[Observation], list[Float32Array]]:
    observations, actions, finished = [env.reset(seed, split)], [], False
    while not finished:
        actions.append(env.demonstrate())
        result = env.step(actions[-1])
        observations.append(result.observation)
        finished = result.finished
    return observations, actions


def test_an_unsupported_frame_rate_is_refused(tmp_path: Path) -> None:
    env = TabletopEnvironment()
    env.fps = 12.5
    with pytest.raises(SimulationError, match=r"runs at 12.5 Hz"):
        record(env, tmp_path / "set", 1)
    assert not (tmp_path / "set").exists()


class Watched(TabletopEnvironment):
    """An environment that keeps the demonstrator's actions and the executed actions."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[Float32Array] = []
        self.done: list[Float32Array] = []

    def demonstrate(self) -> Float32Array:
        self.wanted.append(super().demonstrate())
        return self.wanted[-1]

    def step(self, action: Float32Array) -> StepResult:
        self.done.append(action)
        return super().step(action)


def test_disturbed_actions_are_executed_but_the_experts_are_recorded(tmp_path: Path) -> None:
    env = Watched()
    record(env, tmp_path / "set", 10, video_codec=None, disturb=0.2)
    wanted, done = np.stack(env.wanted), np.stack(env.done)
    share = (wanted != done).any(axis=1).mean()
    assert 0.1 < share < 0.3
    recorded = np.stack([row.action for row in open_dataset(tmp_path / "set").rows(images=False)])
    assert np.array_equal(recorded, wanted)


@pytest.mark.parametrize("share", [-0.1, 0.6])
def test_a_share_of_disturbed_steps_out_of_range_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UsageError, match="disturb must be between"):
        record(TabletopEnvironment(), tmp_path / "set", 1, disturb=share)


def test_a_recording_reads_back_exactly(tmp_path: Path) -> None:
    finished: list[None] = []
    env = TabletopEnvironment(wrist_camera=True)
    frames = record(
        env, tmp_path / "set", 2, seed=4, split="test", video_codec=None, on_episode=lambda: finished.append(None)
    )
    dataset = open_dataset(tmp_path / "set")
    info = dataset.info
    assert (info.total_episodes, info.total_rows, info.fps, info.robot_type) == (2, frames, 10, "tabletop")
    assert info.state_names == env.state_names
    assert info.action_names == env.action_names
    assert dict(info.cameras) == env.cameras
    assert len(finished) == 2
    rows = list(dataset.rows())
    assert len(rows) == frames
    for episode, seed in enumerate((4, 5)):
        observations, actions = played(TabletopEnvironment(wrist_camera=True), seed, "test")
        recorded = [row for row in rows if row.episode == episode]
        assert len(recorded) == len(actions)
        for row, observation, action in zip(recorded, observations[:-1], actions, strict=True):
            assert row.instruction == observation.instruction
            assert row.state.tolist() == observation.state.tolist()
            assert row.action.tolist() == action.tolist()
            for camera in env.cameras:
                assert np.array_equal(row.images[camera], observation.images[camera])


def test_a_video_is_close_to_the_recorded_frames(tmp_path: Path) -> None:
    record(TabletopEnvironment(), tmp_path / "set", 1)
    observations, _ = played(TabletopEnvironment(), 0, "train")
    errors = [
        np.abs(row.images["top"].astype(int) - observation.images["top"]).mean()
        for row, observation in zip(open_dataset(tmp_path / "set").rows(), observations[:-1], strict=True)
    ]
    assert max(errors) < 4


def test_scenes_that_the_expert_does_not_solve_are_skipped(tmp_path: Path) -> None:
    record(SomeScenesUnsolved(), tmp_path / "set", 2, video_codec=None)
    first = {row.episode: row for row in open_dataset(tmp_path / "set").rows(images=False) if row.frame == 0}
    expected = [TabletopEnvironment().reset(seed, "train") for seed in (1, 3)]
    assert [first[i].instruction for i in (0, 1)] == [o.instruction for o in expected]
    assert [first[i].state.tolist() for i in (0, 1)] == [o.state.tolist() for o in expected]


@pytest.mark.parametrize("episodes", [0, -3])
def test_a_count_of_episodes_below_one_is_refused(tmp_path: Path, episodes: int) -> None:
    with pytest.raises(UsageError, match="episodes must be at least 1"):
        record(TabletopEnvironment(), tmp_path / "set", episodes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        record(TabletopEnvironment(), tmp_path, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_expert_with_another_action_shape_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    class Wrong(TabletopEnvironment):
        def demonstrate(self) -> Float32Array:
            return np.zeros(2, dtype=np.float32)

    with pytest.raises(SimulationError, match=r"shape \(2,\)"):
        record(Wrong(), tmp_path / "set", 1)
    assert list(tmp_path.iterdir()) == []

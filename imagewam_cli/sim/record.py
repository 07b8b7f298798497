"""Recording demonstrations of an environment's scripted expert as a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import Observation
from imagewam_cli.errors import SimulationError, UsageError
from imagewam_cli.sim.environment import Environment

_MOST_FAILURES = 100
"""Scenes in a row that the expert may fail before recording gives up."""


def record(
    env: Environment,
    out: Path,
    episodes: int,
    *,
    seed: int = 0,
    split: str = "train",
    video_codec: str | None = "h264",
    on_episode: Callable[[], None] = lambda: None,
) -> int:
    """Write `episodes` demonstrations, scenes seed, seed + 1, ..., to the dataset folder `out`; returns the frames.

    Scenes that the expert does not solve are left out and the next one is taken.

    Raises:
        UsageError: fewer than one episode, or `out` holds something.
        SimulationError: the expert fails again and again, or the environment's rate is not a whole number of Hz.
    """
    from imagewam_cli.data.lerobot.writer import LeRobotWriter

    if episodes < 1:
        raise UsageError(f"cannot record {episodes} episodes", "ask for at least one")
    if env.fps != round(env.fps):
        raise SimulationError(f"{env.name!r} runs at {env.fps} Hz; a LeRobot dataset counts whole frames per second")
    frames = 0
    writer = LeRobotWriter(
        out,
        fps=round(env.fps),
        robot_type=env.name,
        cameras=dict(env.cameras),
        state_names=list(env.state_names),
        action_names=list(env.action_names),
        video_codec=video_codec,  # type: ignore[arg-type]
    )
    with writer:
        scene = seed
        for _ in range(episodes):
            first = scene
            while (demonstration := _demonstrate(env, scene, split)) is None:
                scene += 1
                if scene - first >= _MOST_FAILURES:
                    raise SimulationError(f"the expert of {env.name!r} failed in scenes {first} to {scene - 1}")
            observations, actions = demonstration
            writer.add_episode(
                frames={camera: np.stack([o.images[camera] for o in observations]) for camera in env.cameras},
                states=np.stack([o.state for o in observations]),
                actions=np.stack(actions),
                instruction=observations[0].instruction,
            )
            scene += 1
            frames += len(actions)
            on_episode()
    return frames


def _demonstrate(env: Environment, seed: int, split: str) -> tuple[list[Observation], list[np.ndarray]] | None:
    """One observation before each action, or None where the expert failed."""
    observation = env.reset(seed, split)
    observations, actions = [], []
    for _ in range(env.max_steps):
        action = env.demonstrate()
        if action.shape != (len(env.action_names),):
            raise SimulationError(f"the expert of {env.name!r} gave an action of shape {action.shape}")
        observations.append(observation)
        actions.append(action)
        result = env.step(action)
        observation = result.observation
        if result.success:
            return observations, actions
        if result.finished:
            break
    return None

"""Recording demonstrations of an environment's scripted expert as a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.errors import SimulationError, UsageError
from imagewam_cli.sim.environment import Environment

_BURST = 3
"""Steps that a disturbance lasts."""
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
    disturb: float = 0.0,
    on_episode: Callable[[], None] = lambda: None,
) -> int:
    """Write `episodes` demonstrations, scenes seed, seed + 1, ..., to the dataset folder `out`; returns the frames.

    Scenes that the expert does not solve are left out and the next one is taken.

    disturb: share of steps at which something else is carried out than what is recorded: for a few steps in a row a
        random action, so that the recording also shows how to recover (DART, arXiv 1703.09327). The recorded actions
        are the expert's throughout.

    Raises:
        UsageError: fewer than one episode, a share outside [0, 0.5], or `out` holds something.
        SimulationError: the expert fails again and again, or the environment's rate is not a whole number of Hz.
    """
    from imagewam_cli.data.lerobot.writer import LeRobotWriter

    if episodes < 1:
        raise UsageError(f"cannot record {episodes} episodes", "ask for at least one")
    if not 0.0 <= disturb <= 0.5:
        raise UsageError(f"cannot disturb a share {disturb} of the steps", "choose between 0 and 0.5")
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
            while (demonstration := _demonstrate(env, scene, split, disturb)) is None:
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


class _Disturbance:
    """Replaces a share of the actions, `_BURST` in a row by one random action in [-1, 1]."""

    def __init__(self, share: float, actions: int, seed: int) -> None:
        self._rng = np.random.default_rng([11, seed])
        self._start = share / (_BURST * (1 - share) + share)  # per undisturbed step
        self._actions, self._left = actions, 0

    def __call__(self, action: Float32Array) -> Float32Array:
        if self._left == 0 and self._rng.random() < self._start:
            self._left = _BURST
            self._random = self._rng.uniform(-1, 1, size=self._actions).astype(np.float32)
        if self._left == 0:
            return action
        self._left -= 1
        return self._random


def _demonstrate(
    env: Environment, seed: int, split: str, disturb: float
) -> tuple[list[Observation], list[Float32Array]] | None:
    """One observation before each action, or None where the expert failed."""
    observation = env.reset(seed, split)
    disturbance = _Disturbance(disturb, len(env.action_names), seed)
    observations, actions = [], []
    for _ in range(env.max_steps):
        action = env.demonstrate()
        if action.shape != (len(env.action_names),):
            raise SimulationError(f"the expert of {env.name!r} gave an action of shape {action.shape}")
        observations.append(observation)
        actions.append(action)
        result = env.step(disturbance(action))
        observation = result.observation
        if result.success:
            return observations, actions
        if result.finished:
            break
    return None

"""Record demonstrations of an environment's scripted demonstrator as a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.errors import SimulationError, UsageError
from imagewam_cli.sim.environment import Environment, check_environment

_BURST = 3
"""Number of steps that a disturbance lasts."""
_MAX_FAILURES = 100
"""Number of consecutive failed scenes after which recording stops."""


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
    """Record demonstrations of scenes seed, seed + 1, ... into the dataset folder `out`; return the number of frames.

    Scenes that the demonstrator fails are skipped, until there are `episodes` demonstrations.

    disturb: fraction of the steps (0 to 0.5) that execute a random action instead of the recorded one, in bursts of a
        few steps. The dataset then also shows how to recover (DART, arXiv 1703.09327), because it always records the
        demonstrator's action.

    Raises:
        UsageError: `episodes` is below 1, `disturb` is outside [0, 0.5], or `out` is not empty.
        SimulationError: the demonstrator failed too many scenes in a row, or the control rate is not a whole number
            of Hz.
    """
    from imagewam_cli.data.lerobot.writer import LeRobotWriter

    if episodes < 1:
        raise UsageError(f"episodes must be at least 1, got {episodes}")
    if not 0.0 <= disturb <= 0.5:
        raise UsageError(f"disturb must be between 0 and 0.5, got {disturb}")
    check_environment(env, str(getattr(env, "name", type(env).__name__)))
    if env.fps != round(env.fps):
        raise SimulationError(
            f"{env.name!r} runs at {env.fps} Hz, but a LeRobot dataset needs a whole number of frames per second"
        )
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
                if scene - first >= _MAX_FAILURES:
                    raise SimulationError(f"the demonstrator of {env.name!r} failed in scenes {first} to {scene - 1}")
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
    """Replace a fraction of the actions: each burst repeats one random action in [-1, 1] `_BURST` times."""

    def __init__(self, share: float, actions: int, seed: int) -> None:
        self._rng = np.random.default_rng([11, seed])
        # Probability that a burst starts at an undisturbed step, so that bursts make up `share` of all steps.
        self._start = share / (_BURST * (1 - share) + share)
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
    """Return the observation before each action and the actions, or None if the demonstrator failed."""
    observation = env.reset(seed, split)
    disturbance = _Disturbance(disturb, len(env.action_names), seed)
    observations, actions = [], []
    for _ in range(env.max_steps):
        action = env.demonstrate()
        if action.shape != (len(env.action_names),):
            raise SimulationError(f"the demonstrator of {env.name!r} returned an action of shape {action.shape}")
        observations.append(observation)
        actions.append(action)
        result = env.step(disturbance(action))
        observation = result.observation
        if result.success:
            return observations, actions
        if result.finished:
            break
    return None

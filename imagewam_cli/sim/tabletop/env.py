"""`tabletop` as a gymnasium environment and as an imagewam `Environment`."""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np

from imagewam_cli.data.types import Float32Array, FloatArray, Observation, UInt8Image
from imagewam_cli.errors import SimulationError, UnknownNameError
from imagewam_cli.sim.environment import Environment, StepResult
from imagewam_cli.sim.tabletop.demonstrator import demonstrator_action
from imagewam_cli.sim.tabletop.render import render
from imagewam_cli.sim.tabletop.scene import SPLITS, sample_scene
from imagewam_cli.sim.tabletop.world import World

SIZE = 128
MAX_STEPS = 100
MOTOR_NOISE = 0.15
"""Standard deviation of the motor noise on dx and dy, in units of full speed; drawn from the scene's seed."""


class TabletopEnv(gymnasium.Env[dict[str, Any], Float32Array]):
    """The tabletop as a gymnasium environment.

    Observation: `images` (camera -> uint8 (128, 128, 3)) and `state` float32 (3,) = gripper x, y, opening in [0, 1].
    Action: float32 (3,) = (dx, dy, grip) in [-1, 1] at 10 Hz. Reward 1 on success. `info`: instruction, kind, success.
    `reset(seed=..., options={"split": "train" | "test" | "heldout"})`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium declares it this way

    def __init__(
        self, render_mode: str | None = None, *, wrist_camera: bool = False, motor_noise: float = MOTOR_NOISE
    ) -> None:
        self.render_mode = render_mode
        self.cameras = ("top", "wrist") if wrist_camera else ("top",)
        self.motor_noise = motor_noise
        picture = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(dict.fromkeys(self.cameras, picture)),
                "state": gymnasium.spaces.Box(0.0, 1.0, (3,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.world: World | None = None
        self._motors = np.random.default_rng(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        split = (options or {}).get("split", "train")
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        number = seed if seed is not None else int(self.np_random.integers(2**31))
        self.world = World.start(sample_scene(number, split))
        self._motors = np.random.default_rng([SPLITS.index(split), number, 1])
        return self._observation(), self._info()

    def step(self, action: FloatArray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        world = self._world()
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (3,) or not np.isfinite(action).all():
            raise SimulationError(f"a tabletop action must be three finite numbers, got {action!r}")
        if world.success or world.steps >= MAX_STEPS:
            raise SimulationError("the episode has ended", "call reset before the next step")
        noise = self.motor_noise * self._motors.standard_normal(2).astype(np.float32)
        self.world = world.step(action, noise)
        done = self.world.success
        return self._observation(), float(done), done, self.world.steps >= MAX_STEPS, self._info()

    def render(self) -> UInt8Image:
        return render(self._world(), SIZE)

    def _world(self) -> World:
        if self.world is None:
            raise SimulationError("the environment has no scene yet", "call reset before step")
        return self.world

    def _observation(self) -> dict[str, Any]:
        world = self._world()
        return {"images": {c: render(world, SIZE, c) for c in self.cameras}, "state": world.state}

    def _info(self) -> dict[str, Any]:
        world = self._world()
        return {
            "instruction": world.scene.instruction,
            "kind": world.scene.task.kind,
            "success": world.success,
        }


class TabletopEnvironment(Environment):
    """The environment that `imagewam record` and `imagewam eval --env tabletop` run."""

    name = "tabletop"
    fps = 10.0
    max_steps = MAX_STEPS
    state_names = ("gripper_x", "gripper_y", "opening")
    action_names = ("dx", "dy", "grip")
    splits = SPLITS

    def __init__(self, *, wrist_camera: bool = False) -> None:
        self.env = TabletopEnv(wrist_camera=wrist_camera)
        self.cameras = dict.fromkeys(self.env.cameras, (SIZE, SIZE))
        self._info: dict[str, Any] = {}

    def reset(self, seed: int, split: str) -> Observation:
        values, self._info = self.env.reset(seed=seed, options={"split": split})
        return self._observation(values)

    def step(self, action: FloatArray) -> StepResult:
        values, _, success, truncated, self._info = self.env.step(action)
        return StepResult(observation=self._observation(values), success=success, finished=success or truncated)

    def kind(self) -> str:
        return cast(str, self._info["kind"])

    def demonstrate(self) -> Float32Array:
        return demonstrator_action(self.env._world())

    def _observation(self, values: dict[str, Any]) -> Observation:
        return Observation(images=values["images"], state=values["state"], instruction=self._info["instruction"])

"""A simulator, policies and episodes small enough to compute every number by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imagewam_cli.data.types import Float32Array, Observation, UInt8Image
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.sim.environment import Environment, StepResult
from imagewam_cli.sim.rollout import Episode

SIDES = ("go left", "go right")


class Line(Environment):
    """A point on a line starts at 0 and must move 3 to the side in the instruction: right for odd seeds."""

    name = "line"
    fps = 10.0
    max_steps = 8
    state_names = ("x",)
    action_names = ("dx",)
    splits = ("train", "test", "far")

    def __init__(self) -> None:
        self.cameras = {"top": (4, 6)}

    def reset(self, seed: int, split: str) -> Observation:
        self.right, self.goal = seed % 2 == 1, 5 if split == "far" else 3
        self.x = self.steps = 0
        return self._observation()

    def step(self, action: Float32Array) -> StepResult:
        self.x += round(float(action[0]))
        self.steps += 1
        success = self.x == (self.goal if self.right else -self.goal)
        return StepResult(
            observation=self._observation(), success=success, finished=success or self.steps >= self.max_steps
        )

    def kind(self) -> str:
        return "right" if self.right else "left"

    def demonstrate(self) -> Float32Array:
        return np.array([1.0 if self.right else -1.0], dtype=np.float32)

    def _observation(self) -> Observation:
        picture = np.full((4, 6, 3), 100 + 10 * self.x, dtype=np.uint8)
        state = np.array([self.x], dtype=np.float32)
        return Observation(images={"top": picture}, state=state, instruction=SIDES[self.right])


class Obedient(ChunkPolicy):
    """Move to the side in the instruction, and record all instructions."""

    execute = 2

    def __init__(self) -> None:
        self.instructions: list[str] = []

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        self.instructions += [o.instruction for o in observations]
        steps = [1.0 if o.instruction == "go right" else -1.0 for o in observations]
        return np.array(steps, dtype=np.float32)[:, None, None].repeat(4, axis=1)


class Deaf(Obedient):
    """Always move right."""

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        return np.ones((len(observations), 4, 1), dtype=np.float32)


def episode(
    success: bool,
    steps: int = 5,
    *,
    seed: int = 0,
    split: str = "test",
    kind: str = "left",
    instruction: str = "put the red block on the blue zone",
    given: str | None = None,
    size: tuple[int, int] = (32, 48),
) -> Episode:
    """Return an episode of `steps` steps; frame i is grey with brightness 40 + 20 i, at most 250."""
    frames: tuple[UInt8Image, ...] = tuple(
        np.full((*size, 3), min(40 + 20 * i, 250), dtype=np.uint8) for i in range(steps + 1)
    )
    return Episode(
        seed=seed,
        split=split,
        kind=kind,
        instruction=instruction,
        given=instruction if given is None else given,
        success=success,
        steps=steps,
        frames=frames,
    )

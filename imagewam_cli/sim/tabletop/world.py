"""The state of the table: positions, dynamics, success. Rendering and sampling are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from imagewam_cli.data.types import Float32Array
from imagewam_cli.sim.tabletop.scene import Scene, goal_of, reached

STEP = 0.03
"""Table units per control step (10 Hz) at full speed, per axis."""

GRASP_RADIUS = 0.055
"""Maximum distance between the centers of the gripper and a block that it can grasp."""

JAW_SPEED = 0.5
"""Change of the opening per control step: opening or closing takes two steps."""

HELD_OPENING = 0.25
"""Minimum opening reported in the state while the jaws hold a block."""

BOUNDS = (0.04, 0.96)


@dataclass(frozen=True, kw_only=True)
class World:
    """The table at one moment. blocks: their centers, in the scene's order; opening: 1 open, 0 closed."""

    scene: Scene
    blocks: tuple[tuple[float, float], ...]
    gripper: tuple[float, float]
    opening: float = 1.0
    held: int | None = None
    steps: int = field(default=0, compare=False)

    @classmethod
    def start(cls, scene: Scene) -> World:
        return cls(
            scene=scene,
            blocks=tuple((b.x, b.y) for b in scene.blocks),
            gripper=scene.gripper,
            opening=scene.opening,
        )

    @property
    def state(self) -> Float32Array:
        """Robot state, float32 (3,): gripper x, y and opening. A held block keeps the opening above 0."""
        apart = self.opening if self.held is None else max(self.opening, HELD_OPENING)
        return np.array([*self.gripper, apart], dtype=np.float32)

    @property
    def goal(self) -> tuple[float, float]:
        return goal_of(self.scene.task, self.blocks, self.scene.zones)

    @property
    def success(self) -> bool:
        """Whether the named block is at its goal and no longer held."""
        return self.held is None and reached(self.scene.task, self.blocks, self.scene.zones)

    def step(self, action: Float32Array, noise: Float32Array | None = None) -> World:
        """Return the world one control step later.

        action: float32 (3,) = (dx, dy, grip) in [-1, 1], clipped; grip < 0 closes, grip >= 0 opens.
        noise: float32 (2,) motor noise added to (dx, dy), in the same units.
        """
        dx, dy = np.clip(action[:2], -1.0, 1.0)
        if noise is not None:
            dx, dy = dx + noise[0], dy + noise[1]
        low, high = BOUNDS
        x = float(np.clip(self.gripper[0] + STEP * dx, low, high))
        y = float(np.clip(self.gripper[1] + STEP * dy, low, high))
        closing = bool(action[2] < 0)
        opening = float(np.clip(self.opening + (-JAW_SPEED if closing else JAW_SPEED), 0.0, 1.0))
        held = self.held
        # Grasp only while closing, not when already closed; release only when fully open.
        if closing and opening == 0.0 and self.opening > 0.0 and held is None:
            held = self._within_reach((x, y))
        elif not closing and opening == 1.0:
            held = None
        blocks = self.blocks
        if held is not None:
            blocks = tuple((x, y) if i == held else p for i, p in enumerate(blocks))
        return replace(self, blocks=blocks, gripper=(x, y), opening=opening, held=held, steps=self.steps + 1)

    def done(self) -> World:
        """Return the world after a perfect demonstration: the block at its goal, the open gripper above it."""
        goal = self.goal
        blocks = tuple(goal if i == self.scene.task.block else p for i, p in enumerate(self.blocks))
        return replace(self, blocks=blocks, gripper=goal, opening=1.0, held=None)

    def _within_reach(self, at: tuple[float, float]) -> int | None:
        distances = [float(np.hypot(at[0] - x, at[1] - y)) for x, y in self.blocks]
        nearest = int(np.argmin(distances))
        return nearest if distances[nearest] <= GRASP_RADIUS else None

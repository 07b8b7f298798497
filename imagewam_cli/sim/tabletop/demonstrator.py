"""The scripted demonstrator: goes to the block, closes, carries it to the goal, opens. Reads the world, not the
picture."""

from __future__ import annotations

import numpy as np

from imagewam_cli.data.types import Float32Array
from imagewam_cli.sim.tabletop.world import GRASP_RADIUS, STEP, World

_ARRIVED = 0.35 * GRASP_RADIUS

_APPROACH = 0.4
"""Share of the remaining way made in one step, up to full speed: slow near the target, as people are, so that a block
is within reach for some steps before the jaws close."""


def demonstrator_action(world: World) -> Float32Array:
    """What to do now, float32 (3,) in [-1, 1]. A function of the world alone, so it recovers from any state."""
    task = world.scene.task
    if world.held not in (None, task.block):
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)  # the wrong block: let go of it
    if world.held is None and world.success:
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)
    carrying = world.held is not None
    target = world.goal if carrying else world.blocks[task.block]
    offset = np.array(target) - np.array(world.gripper)
    arrived = bool(np.hypot(*offset) <= _ARRIVED)
    if not carrying and not arrived and world.opening < 1.0:
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)  # closed beside the block: open before going on
    closed = arrived != carrying  # close when at the block, stay closed until at the goal
    dx, dy = np.clip(_APPROACH * offset / STEP, -1.0, 1.0)
    return np.array([dx, dy, -1.0 if closed else 1.0], dtype=np.float32)

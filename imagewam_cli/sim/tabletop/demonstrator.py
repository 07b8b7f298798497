"""The scripted demonstrator: move to the block, close, carry it to the goal, open.

It reads the state of the world, not the picture.
"""

from __future__ import annotations

import numpy as np

from imagewam_cli.data.types import Float32Array
from imagewam_cli.sim.tabletop.world import GRASP_RADIUS, STEP, World

_ARRIVED = 0.35 * GRASP_RADIUS
"""Distance to the target below which the gripper counts as arrived."""

_APPROACH = 0.4
"""Share of the remaining distance covered in one step, up to full speed.

So the gripper slows down near its target, and the block is within reach for several steps before the jaws close.
"""


def demonstrator_action(world: World) -> Float32Array:
    """Return the next action, float32 (3,) in [-1, 1].

    It depends only on the current world, so the demonstrator recovers from any state.
    """
    task = world.scene.task
    if world.held not in (None, task.block):
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)  # the wrong block: release it
    if world.held is None and world.success:
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)
    carrying = world.held is not None
    target = world.goal if carrying else world.blocks[task.block]
    offset = np.array(target) - np.array(world.gripper)
    arrived = bool(np.hypot(*offset) <= _ARRIVED)
    if not carrying and not arrived and world.opening < 1.0:
        return np.array([0.0, 0.0, 1.0], dtype=np.float32)  # closed without grasping the block: open first
    closed = arrived != carrying  # close at the block, open at the goal
    dx, dy = np.clip(_APPROACH * offset / STEP, -1.0, 1.0)
    return np.array([dx, dy, -1.0 if closed else 1.0], dtype=np.float32)

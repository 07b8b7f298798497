"""Build a tabletop scene with known positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from imagewam_cli.data.types import Float32Array
from imagewam_cli.sim.tabletop.demonstrator import demonstrator_action
from imagewam_cli.sim.tabletop.scene import Block, Scene, Task, Zone
from imagewam_cli.sim.tabletop.world import World

RED, GREEN, PURPLE = (0.3, 0.3), (0.7, 0.3), (0.5, 0.75)
BLUE_ZONE, YELLOW_ZONE = (0.2, 0.6), (0.8, 0.6)


def scene_with(task: Task) -> Scene:
    """Return a scene with a red square, a green circle, a purple triangle, two zones and the gripper at the top."""
    return Scene(
        blocks=(
            Block(color="red", shape="square", x=RED[0], y=RED[1]),
            Block(color="green", shape="circle", x=GREEN[0], y=GREEN[1]),
            Block(color="purple", shape="triangle", x=PURPLE[0], y=PURPLE[1]),
        ),
        zones=(
            Zone(color="blue", x=BLUE_ZONE[0], y=BLUE_ZONE[1]),
            Zone(color="yellow", x=YELLOW_ZONE[0], y=YELLOW_ZONE[1]),
        ),
        gripper=(0.5, 0.1),
        task=task,
    )


RED_ON_YELLOW = Task(kind="place", block=0, zone=1)
RED_ON_BLUE = Task(kind="place", block=0, zone=0)
GREEN_ON_BLUE = Task(kind="place", block=1, zone=0)
RED_LEFT_OF_PURPLE = Task(kind="beside", block=0, other=2, relation="left")


def action(dx: float = 0.0, dy: float = 0.0, grip: float = 1.0) -> Float32Array:
    return np.array([dx, dy, grip], dtype=np.float32)


def play(world: World, steps: int, rng: np.random.Generator | None = None, noise: float = 0.0) -> World:
    """Return the world after at most `steps` actions of the demonstrator, with motor noise `noise`."""
    for _ in range(steps):
        if world.success:
            break
        error = None if rng is None else noise * rng.standard_normal(2).astype(np.float32)
        world = world.step(demonstrator_action(world), error)
    return world


def without_gripper(world: World) -> World:
    """Return the same world with the gripper outside the picture."""
    return replace(world, gripper=(-1.0, -1.0))

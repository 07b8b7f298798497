"""Training examples for an image editor (before, instruction, after), and the judge of an edited picture.

The picture before shows any moment of an episode, not only its start: the gripper may be anywhere, approaching, or
carrying the block. So the editor learns the prefix that a policy needs at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.sim.tabletop.render import BLOCK_RGB, BORDER_RGB, GRIPPER_RGB, TABLE_RGB, ZONE_RGB, render
from imagewam_cli.sim.tabletop.scene import BLOCK_HALF, SPLITS, Scene, Split, reached, sample_scene
from imagewam_cli.sim.tabletop.world import World

_COLOR_TOLERANCE = 60.0
"""Maximum RGB distance (0..255) at which a pixel counts as a block's color."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One training example. `before` and `after`: uint8 (H, W, 3)."""

    scene: Scene
    before: UInt8Image
    after: UInt8Image

    @property
    def instruction(self) -> str:
        return self.scene.instruction


def sample_edit(seed: int, split: Split = "train", *, size: int = 128, from_start: bool = False) -> Edit:
    """Return the edit of (split, seed): a moment of the scene's episode, and its end.

    size: height and width in pixels; from_start: use the first moment instead of a random one.
    """
    scene = sample_scene(seed, split)
    world = World.start(scene)
    if not from_start:
        rng = np.random.default_rng([7, SPLITS.index(split), seed])
        moment = _some_moment(world, rng)
        while reached(scene.task, moment.blocks, scene.zones):  # skip moments in which the task is already done
            moment = _some_moment(world, rng)
        world = moment
    return Edit(scene=scene, before=render(world, size), after=render(world.done(), size))


def _some_moment(world: World, rng: np.random.Generator) -> World:
    """Sample a moment before the grasp or while carrying, with the gripper on its path or anywhere."""
    block = world.scene.task.block
    start, goal = world.blocks[block], world.goal
    carrying = bool(rng.random() < 0.45)
    a, b = (start, goal) if carrying else (world.gripper, start)
    on_path = rng.random() < 0.7
    share = rng.random()
    point = np.array(a) + share * (np.array(b) - np.array(a)) if on_path else rng.uniform(0.06, 0.94, size=2)
    point = np.clip(point + rng.normal(0.0, 0.015, size=2), 0.05, 0.95)
    at = (float(point[0]), float(point[1]))
    opening = float(rng.choice([0.0, 0.5] if carrying else [1.0, 1.0, 1.0, 0.5]))
    if not carrying:
        return replace(world, gripper=at, opening=opening)
    blocks = tuple(at if i == block else p for i, p in enumerate(world.blocks))
    return replace(world, blocks=blocks, gripper=at, opening=opening, held=block)


def judge_edit(picture: UInt8Image, scene: Scene) -> bool:
    """Return whether the picture shows the finished task.

    The judge finds every block by its color; most pixels of that color must be in one place. The named block must be
    at its goal, and every other block within 0.06 of its position in the scene: an edit that moves, loses or duplicates
    another block is incorrect.
    """
    labels = _nearest_colors(picture)
    found = [_find(labels, b.color) for b in scene.blocks]
    if any(f is None for f in found):
        return False
    positions = tuple((f[0], f[1]) for f in found if f is not None)
    task = scene.task
    moved = [
        max(abs(x - b.x), abs(y - b.y))
        for i, ((x, y), b) in enumerate(zip(positions, scene.blocks, strict=True))
        if i != task.block
    ]
    return max(moved) <= 0.06 and reached(task, positions, scene.zones)


_PALETTE = np.array(
    [*BLOCK_RGB.values(), *ZONE_RGB.values(), *BORDER_RGB.values(), TABLE_RGB, GRIPPER_RGB], dtype=np.float32
)
_COLOR_INDEX = {color: i for i, color in enumerate(BLOCK_RGB)}


def _nearest_colors(picture: UInt8Image) -> npt.NDArray[np.int64]:
    """Return each pixel's nearest palette color as an index, (H, W); -1 if no color is near."""
    distance = ((picture[:, :, None, :].astype(np.float32) - _PALETTE) ** 2).sum(-1)
    return np.where(distance.min(-1) < _COLOR_TOLERANCE**2, distance.argmin(-1), -1)


def _find(labels: npt.NDArray[np.int64], color: str) -> tuple[float, float] | None:
    """Return the center (x, y) of the block of that color, or None if no window contains enough pixels of it."""
    size = labels.shape[0]
    mask = labels == _COLOR_INDEX[color]
    window = round(2.4 * BLOCK_HALF * size)
    gathered = _box_sum(mask, window)
    row, column = np.unravel_index(int(gathered.argmax()), gathered.shape)
    area = float(gathered[row, column]) / (2 * BLOCK_HALF * size) ** 2
    if not 0.3 <= area <= 1.5 or mask.sum() > 1.6 * gathered[row, column]:
        return None
    top, left = int(row), int(column)
    ys, xs = np.nonzero(mask[top : top + window, left : left + window])
    return float((xs.mean() + left + 0.5) / size), float((ys.mean() + top + 0.5) / size)


def _box_sum(mask: npt.NDArray[np.bool_], window: int) -> npt.NDArray[np.int64]:
    """Count the set pixels of each window x window square, indexed by its upper left corner."""
    table = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums: npt.NDArray[np.int64] = (
        table[window:, window:] - table[:-window, window:] - table[window:, :-window] + table[:-window, :-window]
    )
    return sums

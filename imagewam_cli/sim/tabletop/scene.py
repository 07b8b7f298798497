"""Sample scenes and tasks from a seed.

A scene has three to five blocks of different colors, two or three colored zones and a gripper position. A task names
one block and its goal: a zone, or a side of another block. The three splits never share a scene (the split is part of
the random generator's seed), and `HELD_OUT_PAIRS` occur only in the split `heldout`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "test", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)
Relation = Literal["left", "right", "above", "below"]
Kind = Literal["place", "beside"]

BLOCK_COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
ZONE_COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle", "triangle")
RELATIONS: tuple[Relation, ...] = get_args(Relation)
KINDS: tuple[Kind, ...] = get_args(Kind)

HELD_OUT_PAIRS = frozenset({("red", "blue"), ("green", "yellow"), ("blue", "red"), ("purple", "green")})
"""Pairs (block color, zone color) that never occur in training demonstrations or training edits."""

BLOCK_HALF = 0.055
ZONE_HALF = 0.12
BESIDE_OFFSET = 0.18
"""Distance between the centers of a block and the block that it is put "beside"."""

MARGIN = 0.08
MIN_BLOCK_GAP = 0.16
MIN_TRAVEL = 0.68
"""Minimum distance from the gripper to the block to the goal, so that an episode has at least 25 steps.

Each leg counts with its largest coordinate difference.
"""

_PLACE_SHARE = 0.65
_CLOSED_SHARE = 0.3
_DIRECTIONS: dict[Relation, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Block:
    color: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Zone:
    color: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Put block `block` on zone `zone` (kind `place`) or on side `relation` of block `other` (kind `beside`).

    Blocks and zones are indices into those of the scene.
    """

    kind: Kind
    block: int
    zone: int | None = None
    other: int | None = None
    relation: Relation | None = None
    phrasing: int = 0
    """Number that selects the sentence; see `instruction`."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene with its task.

    gripper: (x, y) at the start; opening: of the jaws at the start, 1 open, 0 closed.
    """

    blocks: tuple[Block, ...]
    zones: tuple[Zone, ...]
    gripper: tuple[float, float]
    task: Task
    opening: float = 1.0

    @property
    def pair(self) -> tuple[str, str] | None:
        """The pair (block color, zone color) of a `place` task; None for `beside`."""
        if self.task.zone is None:
            return None
        return self.blocks[self.task.block].color, self.zones[self.task.zone].color

    @property
    def instruction(self) -> str:
        return instruction(self)


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """Return the scene of (split, seed): the same on every machine."""
    rng = np.random.default_rng([SPLITS.index(split), seed])
    while True:
        scene = _propose(rng, held_out=split == "heldout")
        if scene is not None:
            # A missed grasp ends with closed, empty jaws; demonstrations must show how to recover from it.
            return replace(scene, opening=float(rng.random() >= _CLOSED_SHARE))


def goal_of(task: Task, blocks: tuple[tuple[float, float], ...], zones: tuple[Zone, ...]) -> tuple[float, float]:
    """Return the goal (x, y) of the task's block, for blocks at these positions."""
    if task.zone is not None:
        return zones[task.zone].x, zones[task.zone].y
    assert task.other is not None
    assert task.relation is not None
    dx, dy = _DIRECTIONS[task.relation]
    x, y = blocks[task.other]
    return x + BESIDE_OFFSET * dx, y + BESIDE_OFFSET * dy


def reached(task: Task, blocks: tuple[tuple[float, float], ...], zones: tuple[Zone, ...]) -> bool:
    """Return whether the named block is at its goal.

    On a zone: its center is inside. Beside a block: it is on the requested side, near enough and aligned.
    """
    x, y = blocks[task.block]
    gx, gy = goal_of(task, blocks, zones)
    if task.zone is not None:
        return max(abs(x - gx), abs(y - gy)) <= ZONE_HALF
    assert task.relation is not None
    along, across = (x - gx, y - gy) if task.relation in ("left", "right") else (y - gy, x - gx)
    return abs(along) <= 0.09 and abs(across) <= 0.08


_BLOCK_WORDS = ("{color} {shape}", "{color} block", "{color} {shape}", "{color} one")
_PLACE_SENTENCES = (
    "put the {block} on the {zone} zone",
    "place the {block} in the {zone} zone",
    "move the {block} to the {zone} zone",
    "bring the {block} onto the {zone} area",
    "the {block} belongs on the {zone} zone",
    "pick up the {block} and drop it on the {zone} area",
)
_BESIDE_WORDS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
_BESIDE_SENTENCES = (
    "move the {block} {relation} the {other}",
    "put the {block} {relation} the {other}",
    "place the {block} {relation} the {other}",
    "pick up the {block} and set it {relation} the {other}",
)
PHRASINGS = len(_BLOCK_WORDS) ** 2 * len(_PLACE_SENTENCES) * len(_BESIDE_SENTENCES)


def instruction(scene: Scene) -> str:
    """Return the task in English; `task.phrasing` selects the sentence and the words for the blocks."""
    task = scene.task
    rest, first_word = divmod(task.phrasing, len(_BLOCK_WORDS))
    rest, second_word = divmod(rest, len(_BLOCK_WORDS))
    block = _call(scene.blocks[task.block], first_word)
    if task.zone is not None:
        sentence = _PLACE_SENTENCES[rest % len(_PLACE_SENTENCES)]
        return sentence.format(block=block, zone=scene.zones[task.zone].color)
    assert task.other is not None
    assert task.relation is not None
    sentence = _BESIDE_SENTENCES[rest % len(_BESIDE_SENTENCES)]
    other = _call(scene.blocks[task.other], second_word)
    return sentence.format(block=block, relation=_BESIDE_WORDS[task.relation], other=other)


def _call(block: Block, word: int) -> str:
    return _BLOCK_WORDS[word].format(color=block.color, shape=block.shape)


def _propose(rng: np.random.Generator, *, held_out: bool) -> Scene | None:
    """Draw one scene.

    Return None if blocks overlap, the task is already done or too short, or its color pair belongs to another split.
    """
    zones = _place_zones(rng)
    blocks = _place_blocks(rng, zones) if zones is not None else None
    if zones is None or blocks is None:
        return None
    gripper = (float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.1, 0.9)))
    task = _choose_task(rng, blocks, zones, held_out=held_out)
    if task is None:
        return None
    positions = tuple((b.x, b.y) for b in blocks)
    goal = goal_of(task, positions, zones)
    start = positions[task.block]
    if not all(MARGIN <= c <= 1 - MARGIN for c in goal) or reached(task, positions, zones):
        return None
    if _leg(gripper, start) + _leg(start, goal) < MIN_TRAVEL:
        return None
    if any(_leg(goal, p) < 0.13 for i, p in enumerate(positions) if i != task.block):
        return None
    return Scene(blocks=blocks, zones=zones, gripper=gripper, task=task)


def _place_zones(rng: np.random.Generator) -> tuple[Zone, ...] | None:
    colors = rng.permutation(len(ZONE_COLORS))[: int(rng.integers(2, 4))]
    zones: list[Zone] = []
    for color in colors:
        for _ in range(30):
            x, y = rng.uniform(ZONE_HALF + 0.02, 1 - ZONE_HALF - 0.02, size=2)
            if all(_leg((x, y), (z.x, z.y)) > 2 * ZONE_HALF + 0.03 for z in zones):
                zones.append(Zone(color=ZONE_COLORS[color], x=float(x), y=float(y)))
                break
        else:
            return None
    return tuple(zones)


def _place_blocks(rng: np.random.Generator, zones: tuple[Zone, ...]) -> tuple[Block, ...] | None:
    colors = rng.permutation(len(BLOCK_COLORS))[: int(rng.integers(3, 6))]
    blocks: list[Block] = []
    for color in colors:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        for _ in range(40):
            x, y = rng.uniform(MARGIN, 1 - MARGIN, size=2)
            clear_of_zones = all(_leg((x, y), (z.x, z.y)) > ZONE_HALF + BLOCK_HALF for z in zones)
            if clear_of_zones and all(_leg((x, y), (b.x, b.y)) > MIN_BLOCK_GAP for b in blocks):
                blocks.append(Block(color=BLOCK_COLORS[color], shape=shape, x=float(x), y=float(y)))
                break
        else:
            return None
    return tuple(blocks)


def _choose_task(
    rng: np.random.Generator, blocks: tuple[Block, ...], zones: tuple[Zone, ...], *, held_out: bool
) -> Task | None:
    phrasing = int(rng.integers(PHRASINGS))
    if held_out or rng.random() < _PLACE_SHARE:
        pairs = [
            (b, z)
            for b, block in enumerate(blocks)
            for z, zone in enumerate(zones)
            if ((block.color, zone.color) in HELD_OUT_PAIRS) == held_out
        ]
        if not pairs:
            return None
        b, z = pairs[int(rng.integers(len(pairs)))]
        return Task(kind="place", block=b, zone=z, phrasing=phrasing)
    b, other = (int(i) for i in rng.permutation(len(blocks))[:2])
    return Task(kind="beside", block=b, other=other, relation=RELATIONS[int(rng.integers(4))], phrasing=phrasing)


def _leg(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return the largest coordinate difference: both axes move at once, so it determines the time."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))

"""Test properties of sampled scenes, on hundreds of seeds of each split."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest

from imagewam_cli.sim.tabletop.scene import (
    BLOCK_COLORS,
    BLOCK_HALF,
    HELD_OUT_PAIRS,
    KINDS,
    MIN_BLOCK_GAP,
    PHRASINGS,
    RELATIONS,
    SHAPES,
    ZONE_COLORS,
    ZONE_HALF,
    Scene,
    Split,
    Task,
    goal_of,
    reached,
    sample_scene,
)
from tests.support.scenes import PURPLE, RED_LEFT_OF_PURPLE, RED_ON_YELLOW, scene_with

SPLITS: tuple[Split, ...] = get_args(Split)
SEEDS = range(250)


@pytest.fixture(scope="module")
def scenes() -> dict[Split, list[Scene]]:
    return {split: [sample_scene(seed, split) for seed in SEEDS] for split in SPLITS}


@pytest.fixture(scope="module")
def everything(scenes: dict[Split, list[Scene]]) -> list[Scene]:
    return [scene for split in SPLITS for scene in scenes[split]]


def gap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return the larger of the two coordinate differences."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def test_a_seed_always_gives_the_same_scene(scenes: dict[Split, list[Scene]]) -> None:
    for split in SPLITS:
        assert [sample_scene(seed, split) for seed in (0, 1, 100)] == [scenes[split][seed] for seed in (0, 1, 100)]


def test_some_episodes_start_with_closed_jaws(scenes: dict[Split, list[Scene]]) -> None:
    for of_split in scenes.values():
        assert {scene.opening for scene in of_split} == {0.0, 1.0}
        assert 0.2 < sum(scene.opening == 0.0 for scene in of_split) / len(of_split) < 0.4


def test_no_scene_is_repeated_within_or_across_splits(everything: list[Scene]) -> None:
    assert len(set(everything)) == len(everything)
    tables = {(scene.blocks, scene.zones) for scene in everything}
    assert len(tables) == len(everything)


def test_held_out_pairs_occur_only_in_their_split(scenes: dict[Split, list[Scene]]) -> None:
    for split in ("train", "test"):
        assert not HELD_OUT_PAIRS & {scene.pair for scene in scenes[split]}
    assert {scene.pair for scene in scenes["heldout"]} == HELD_OUT_PAIRS


def test_each_colour_of_a_held_out_pair_occurs_in_training(scenes: dict[Split, list[Scene]]) -> None:
    """Only the combination is new: training names each block colour and each zone colour."""
    pairs = {scene.pair for scene in scenes["train"] if scene.pair is not None}
    assert {block for block, _ in HELD_OUT_PAIRS} <= {block for block, _ in pairs}
    assert {zone for _, zone in HELD_OUT_PAIRS} <= {zone for _, zone in pairs}


def test_both_task_kinds_and_all_words_occur_in_training(scenes: dict[Split, list[Scene]]) -> None:
    tasks = [scene.task for scene in scenes["train"]]
    shares = [sum(task.kind == kind for task in tasks) / len(tasks) for kind in KINDS]
    assert min(shares) > 0.2
    assert {task.relation for task in tasks} == {None, *RELATIONS}
    assert {task.kind for scene in [scenes["heldout"]] for task in [s.task for s in scene]} == {"place"}


def test_three_to_five_blocks_of_different_colours(everything: list[Scene]) -> None:
    assert {len(scene.blocks) for scene in everything} == {3, 4, 5}
    for scene in everything:
        colors = [block.color for block in scene.blocks]
        assert len(set(colors)) == len(colors)
        assert set(colors) <= set(BLOCK_COLORS)
        assert all(block.shape in SHAPES for block in scene.blocks)


def test_two_or_three_zones_of_different_colours(everything: list[Scene]) -> None:
    assert {len(scene.zones) for scene in everything} == {2, 3}
    for scene in everything:
        colors = [zone.color for zone in scene.zones]
        assert len(set(colors)) == len(colors)
        assert set(colors) <= set(ZONE_COLORS)


def test_objects_do_not_overlap_and_are_on_the_table(everything: list[Scene]) -> None:
    for scene in everything:
        blocks, zones = [(b.x, b.y) for b in scene.blocks], [(z.x, z.y) for z in scene.zones]
        assert all(BLOCK_HALF <= c <= 1 - BLOCK_HALF for at in blocks for c in at)
        assert all(ZONE_HALF <= c <= 1 - ZONE_HALF for at in zones for c in at)
        assert all(gap(a, b) > MIN_BLOCK_GAP for i, a in enumerate(blocks) for b in blocks[:i])
        assert all(gap(a, b) > 2 * ZONE_HALF for i, a in enumerate(zones) for b in zones[:i])
        assert all(gap(b, z) > ZONE_HALF + BLOCK_HALF for b in blocks for z in zones), "a block starts on a zone"


def test_no_task_is_solved_at_the_start_and_every_goal_is_free(everything: list[Scene]) -> None:
    for scene in everything:
        blocks = tuple((b.x, b.y) for b in scene.blocks)
        task = scene.task
        goal = goal_of(task, blocks, scene.zones)
        assert not reached(task, blocks, scene.zones)
        assert all(BLOCK_HALF <= c <= 1 - BLOCK_HALF for c in goal)
        assert all(gap(goal, at) >= 2 * BLOCK_HALF for i, at in enumerate(blocks) if i != task.block)
        assert task.block != task.other


def test_an_instruction_names_one_block_and_its_target(everything: list[Scene]) -> None:
    """The block's colour is named before the target's. If a shape is named, it is that of one of the two blocks."""
    for scene in everything:
        words = re.findall("|".join({*BLOCK_COLORS, *ZONE_COLORS}), scene.instruction)
        task, blocks = scene.task, scene.blocks
        target = scene.zones[task.zone].color if task.zone is not None else blocks[task.other or 0].color
        assert words == [blocks[task.block].color, target]
        shapes = set(re.findall("|".join(SHAPES), scene.instruction))
        assert shapes <= {blocks[task.block].shape, blocks[task.other or 0].shape}


def test_instructions_have_many_phrasings() -> None:
    on_zone = {scene_with(replace(RED_ON_YELLOW, phrasing=i)).instruction for i in range(PHRASINGS)}
    assert len(on_zone) == 3 * 6  # "red square", "red block", "red one" in six sentences
    assert all("red" in s and "yellow" in s for s in on_zone)
    beside = {scene_with(replace(RED_LEFT_OF_PURPLE, phrasing=i)).instruction for i in range(PHRASINGS)}
    assert len(beside) == 3 * 3 * 4
    assert all(s.index("red") < s.index("left of") < s.index("purple") for s in beside)


def test_every_phrasing_is_sampled(scenes: dict[Split, list[Scene]]) -> None:
    assert len({scene.instruction for scene in scenes["train"]}) > 150
    assert all(0 <= scene.task.phrasing < PHRASINGS for scene in scenes["train"])


@pytest.mark.parametrize(
    ("task", "at", "expected"),
    [
        (RED_ON_YELLOW, (0.8, 0.6), True),
        (RED_ON_YELLOW, (0.8 + 0.11, 0.6 - 0.11), True),
        (RED_ON_YELLOW, (0.8 + 0.13, 0.6), False),
        (RED_LEFT_OF_PURPLE, (PURPLE[0] - 0.18, PURPLE[1]), True),
        (RED_LEFT_OF_PURPLE, (PURPLE[0] - 0.18, PURPLE[1] + 0.1), False),
        (RED_LEFT_OF_PURPLE, (PURPLE[0] + 0.18, PURPLE[1]), False),
        (RED_LEFT_OF_PURPLE, (PURPLE[0] - 0.35, PURPLE[1]), False),
    ],
)
def test_a_task_is_solved_at_its_goal(task: Task, at: tuple[float, float], expected: bool) -> None:
    scene = scene_with(task)
    blocks = (at, *((b.x, b.y) for b in scene.blocks[1:]))
    assert reached(task, blocks, scene.zones) is expected


@pytest.mark.parametrize(
    ("relation", "offset"), [("left", (-1, 0)), ("right", (1, 0)), ("above", (0, -1)), ("below", (0, 1))]
)
def test_directions_are_relative_to_the_image(relation, offset: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    scene = scene_with(replace(RED_LEFT_OF_PURPLE, relation=relation))
    goal = goal_of(scene.task, tuple((b.x, b.y) for b in scene.blocks), scene.zones)
    assert goal == pytest.approx((PURPLE[0] + 0.18 * offset[0], PURPLE[1] + 0.18 * offset[1]))

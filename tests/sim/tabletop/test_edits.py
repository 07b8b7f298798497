"""Test before-and-after images, and the judge, which sees only an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.sim.tabletop.edits import judge_edit, sample_edit
from imagewam_cli.sim.tabletop.render import render
from imagewam_cli.sim.tabletop.scene import HELD_OUT_PAIRS, Scene, Split, reached, sample_scene
from imagewam_cli.sim.tabletop.world import World
from tests.support.scenes import (
    GREEN_ON_BLUE,
    PURPLE,
    RED,
    RED_LEFT_OF_PURPLE,
    RED_ON_YELLOW,
    play,
    scene_with,
    without_gripper,
)

SEEDS = range(10)
NOWHERE = (-1.0, -1.0)


def done(scene: Scene) -> World:
    return World.start(scene).done()


def moved(world: World, block: int, to: tuple[float, float]) -> UInt8Image:
    return render(replace(world, blocks=tuple(to if i == block else p for i, p in enumerate(world.blocks))))


@pytest.mark.parametrize("split", ["train", "test", "heldout"])
def test_the_judge_accepts_the_after_image_and_rejects_the_before_image(split: Split) -> None:
    for seed in SEEDS:
        edit = sample_edit(seed, split, from_start=True)
        assert judge_edit(edit.after, edit.scene), f"{split} {seed}"
        assert not judge_edit(edit.before, edit.scene), f"{split} {seed}"


def test_the_judge_agrees_with_the_world_at_every_moment() -> None:
    """The image does not show whether a block was released, so a block held above its goal counts as placed."""
    for seed in SEEDS:
        world = World.start(sample_scene(seed))
        for _ in range(9):
            there = reached(world.scene.task, world.blocks, world.scene.zones)
            assert judge_edit(render(world), world.scene) is there, f"seed {seed}, step {world.steps}"
            world = play(world, 6)
        assert world.success


def test_an_edit_shows_the_scene_of_its_seed() -> None:
    edit = sample_edit(5, "test", size=64)
    assert edit.scene == sample_scene(5, "test")
    assert edit.instruction == edit.scene.instruction
    assert edit.before.shape == edit.after.shape == (64, 64, 3)
    again = sample_edit(5, "test", size=64)
    assert np.array_equal(edit.before, again.before)
    assert np.array_equal(edit.after, again.after)


def test_from_start_makes_the_before_image_the_first_of_the_episode() -> None:
    edit = sample_edit(5, "test", from_start=True)
    assert np.array_equal(edit.before, render(World.start(edit.scene)))
    assert np.array_equal(edit.after, render(done(edit.scene)))


def test_edits_start_at_different_moments_of_the_episode() -> None:
    starts = [np.array_equal(sample_edit(s).before, sample_edit(s, from_start=True).before) for s in SEEDS]
    assert sum(starts) <= 1


def test_no_training_edit_shows_a_held_out_pair() -> None:
    assert not HELD_OUT_PAIRS & {sample_edit(seed, "train", size=16).scene.pair for seed in range(100)}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_missing_block_is_rejected(seed: int) -> None:
    scene = sample_scene(seed)
    end = without_gripper(done(scene))
    assert judge_edit(render(end), scene)
    for block in range(len(scene.blocks)):
        assert not judge_edit(moved(end, block, NOWHERE), scene)


@pytest.mark.parametrize("task", [RED_ON_YELLOW, RED_LEFT_OF_PURPLE])
def test_moving_another_block_is_rejected(task) -> None:  # type: ignore[no-untyped-def]
    scene = scene_with(task)
    end = without_gripper(done(scene))
    assert judge_edit(render(end), scene)
    green_moved = moved(end, 1, (0.7, 0.2))
    assert not judge_edit(green_moved, scene)
    assert judge_edit(moved(end, 1, (0.71, 0.31)), scene), "a tiny movement of another block is rejected"


def test_the_wrong_block_at_the_goal_is_rejected() -> None:
    scene = scene_with(RED_ON_YELLOW)
    assert not judge_edit(moved(World.start(scene), 1, (0.8, 0.6)), scene)


def test_the_right_block_at_the_goal_of_another_task_is_rejected() -> None:
    after = {task: render(done(scene_with(task))) for task in (RED_ON_YELLOW, RED_LEFT_OF_PURPLE, GREEN_ON_BLUE)}
    for shown, picture in after.items():
        for asked in after:
            assert judge_edit(picture, scene_with(asked)) is (shown == asked)


def test_a_duplicated_block_is_rejected() -> None:
    scene = scene_with(RED_ON_YELLOW)
    end = without_gripper(done(scene))
    doubled = render(end).copy()
    before = render(without_gripper(World.start(scene)))
    size = doubled.shape[0]
    rows = slice(int((RED[1] - 0.08) * size), int((RED[1] + 0.08) * size))
    columns = slice(int((RED[0] - 0.08) * size), int((RED[0] + 0.08) * size))
    doubled[rows, columns] = before[rows, columns]
    assert not judge_edit(doubled, scene)


def test_an_empty_or_noisy_image_is_rejected() -> None:
    scene = scene_with(RED_ON_YELLOW)
    noise = np.random.default_rng(0).integers(0, 256, size=(128, 128, 3), dtype=np.uint8)
    assert not judge_edit(np.zeros((128, 128, 3), dtype=np.uint8), scene)
    assert not judge_edit(noise, scene)


def test_slightly_wrong_colours_are_accepted() -> None:
    """Accept the slightly wrong colours and soft edges that an image editor draws."""
    scene = scene_with(RED_ON_YELLOW)
    picture = render(done(scene)).astype(int)
    noise = np.random.default_rng(0).integers(-12, 13, size=picture.shape)
    assert judge_edit(np.clip(picture + noise, 0, 255).astype(np.uint8), scene)


def test_a_block_in_the_gripper_is_found() -> None:
    """The gripper does not hide any part of a block between its jaws."""
    scene = scene_with(RED_ON_YELLOW)
    assert judge_edit(render(replace(done(scene), opening=0.0)), scene)
    assert not judge_edit(render(replace(World.start(scene), gripper=PURPLE)), scene)

"""Test that the scripted demonstrator solves every scene and recovers from mistakes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from imagewam_cli.sim.tabletop.demonstrator import demonstrator_action
from imagewam_cli.sim.tabletop.env import MAX_STEPS, MOTOR_NOISE, SPLITS
from imagewam_cli.sim.tabletop.render import render
from imagewam_cli.sim.tabletop.scene import Split, sample_scene
from imagewam_cli.sim.tabletop.world import GRASP_RADIUS, STEP, World
from tests.support.scenes import GREEN, GREEN_ON_BLUE, RED, RED_ON_BLUE, RED_ON_YELLOW, action, play, scene_with


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_is_solved_in_25_to_100_steps_despite_motor_noise(split: Split) -> None:
    for seed in range(60):
        for noise in (0.0, MOTOR_NOISE):
            end = play(World.start(sample_scene(seed, split)), MAX_STEPS, np.random.default_rng(seed), noise)
            assert end.success, f"{split} {seed}, noise {noise}"
            assert 25 <= end.steps < MAX_STEPS, f"{split} {seed}, noise {noise}"


def test_actions_are_in_range() -> None:
    world = World.start(sample_scene(3))
    while not world.success:
        chosen = demonstrator_action(world)
        assert chosen.shape == (3,)
        assert chosen.dtype == np.float32
        assert np.abs(chosen).max() <= 1
        world = world.step(chosen)


def test_another_instruction_for_the_same_image_needs_another_action() -> None:
    """The image alone does not determine which block to move."""
    tasks = (RED_ON_YELLOW, GREEN_ON_BLUE)
    worlds = [World.start(scene_with(task)) for task in tasks]
    assert np.array_equal(render(worlds[0]), render(worlds[1]))
    assert worlds[0].state.tolist() == worlds[1].state.tolist()
    assert worlds[0].scene.instruction != worlds[1].scene.instruction
    to_red, to_green = (demonstrator_action(world) for world in worlds)
    assert to_red[0] < 0 < to_green[0]  # red is on the left, green on the right
    for task in tasks:
        assert play(World.start(scene_with(task)), MAX_STEPS).success


def test_another_instruction_moves_the_same_block_elsewhere() -> None:
    carrying = [
        replace(World.start(scene_with(task)), gripper=RED, opening=0.0, held=0)
        for task in (RED_ON_BLUE, RED_ON_YELLOW)
    ]
    assert np.array_equal(render(carrying[0]), render(carrying[1]))
    assert [demonstrator_action(world).tolist() for world in carrying] == [[-1, 1, -1], [1, 1, -1]]


def test_it_goes_straight_to_the_block_and_slows_down() -> None:
    def speed(distance: float) -> float:
        chosen = demonstrator_action(
            replace(World.start(scene_with(RED_ON_YELLOW)), gripper=(RED[0] - distance, RED[1]))
        )
        assert chosen[1:].tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
        return float(chosen[0])

    assert speed(3 * STEP) == 1.0
    assert 0 < speed(STEP) < speed(2 * STEP) < 1.0


def test_the_block_is_within_reach_before_the_jaws_begin_to_close() -> None:
    """A policy that imitates the demonstrator but closes one step early still grasps the block."""
    world = World.start(scene_with(RED_ON_YELLOW))
    within_reach = 0
    while demonstrator_action(world)[2] > 0:
        within_reach += math.dist(world.gripper, RED) <= GRASP_RADIUS
        world = world.step(demonstrator_action(world))
    assert within_reach >= 2


def test_it_releases_a_wrong_block() -> None:
    world = replace(World.start(scene_with(RED_ON_YELLOW)), gripper=GREEN, opening=0.0, held=1)
    assert demonstrator_action(world).tolist() == [0.0, 0.0, 1.0]
    assert play(world, MAX_STEPS).success


def test_it_opens_a_closed_gripper_before_moving() -> None:
    world = replace(World.start(scene_with(RED_ON_YELLOW)), opening=0.0)
    assert demonstrator_action(world).tolist() == [0.0, 0.0, 1.0]
    assert play(world, MAX_STEPS).success


def test_it_recovers_after_the_block_was_dropped_or_knocked_away() -> None:
    world = play(World.start(scene_with(RED_ON_YELLOW)), 20)
    assert world.held == 0
    dropped = world.step(action(grip=1)).step(action(grip=1))
    assert dropped.held is None
    knocked = replace(dropped, blocks=((0.1, 0.9), *dropped.blocks[1:]))
    for disturbed in (dropped, knocked):
        assert play(disturbed, MAX_STEPS).success

"""Test the mechanics: moving, grasping, carrying and releasing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imagewam_cli.sim.tabletop.world import BOUNDS, GRASP_RADIUS, HELD_OPENING, STEP, World
from tests.support.scenes import PURPLE, RED, RED_ON_YELLOW, YELLOW_ZONE, action, scene_with


@pytest.fixture
def world() -> World:
    return World.start(scene_with(RED_ON_YELLOW))


def at(world: World, x: float, y: float) -> World:
    return replace(world, gripper=(x, y))


def close(world: World) -> World:
    return world.step(action(grip=-1)).step(action(grip=-1))


def test_a_world_starts_in_the_layout_of_its_scene(world: World) -> None:
    assert world.blocks[0] == RED
    assert world.gripper == (0.5, 0.1)
    assert (world.opening, world.held, world.success) == (1.0, None, False)
    assert world.state.tolist() == pytest.approx([0.5, 0.1, 1.0])
    assert world.state.dtype == np.float32


def test_an_action_of_one_moves_by_the_largest_step(world: World) -> None:
    moved = world.step(action(1.0, -0.5))
    assert moved.gripper == pytest.approx((0.5 + STEP, 0.1 - 0.5 * STEP))
    assert moved.steps == 1
    assert world.step(action(7.0, 0.0)).gripper == pytest.approx((0.5 + STEP, 0.1))


def test_motor_noise_is_added_after_clipping(world: World) -> None:
    moved = world.step(action(7.0, 0.0), np.array([0.5, -0.5], dtype=np.float32))
    assert moved.gripper == pytest.approx((0.5 + 1.5 * STEP, 0.1 - 0.5 * STEP))


def test_the_gripper_stays_within_its_bounds(world: World) -> None:
    low, high = BOUNDS
    for _ in range(60):
        world = world.step(action(1.0, 1.0))
    assert world.gripper == pytest.approx((high, high))
    for _ in range(60):
        world = world.step(action(-1.0, -1.0))
    assert world.gripper == pytest.approx((low, low))


def test_closing_takes_two_steps_and_grasps_the_block_below(world: World) -> None:
    half = at(world, *RED).step(action(grip=-1))
    assert (half.opening, half.held) == (0.5, None)
    closed = half.step(action(grip=-1))
    assert (closed.opening, closed.held) == (0.0, 0)
    assert closed.step(action(grip=-1)).held == 0


def test_the_state_distinguishes_jaws_that_hold_a_block_from_empty_ones(world: World) -> None:
    """A block keeps the jaws apart, so a policy can see whether its grasp failed."""
    assert close(at(world, *RED)).state[2] == HELD_OPENING > 0
    assert close(world).state[2] == 0.0
    opening = close(at(world, *RED)).step(action(grip=1))
    assert opening.state[2] == opening.opening == 0.5


@pytest.mark.parametrize(("distance", "held"), [(GRASP_RADIUS - 0.001, 0), (GRASP_RADIUS + 0.001, None)])
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, -1.0), (0.6, 0.8)])
def test_only_a_block_within_reach_is_grasped(
    world: World, distance: float, held: int | None, direction: tuple[float, float]
) -> None:
    near = at(world, RED[0] + distance * direction[0], RED[1] + distance * direction[1])
    assert close(near).held == held


def test_the_nearer_of_two_blocks_is_grasped(world: World) -> None:
    crowded = replace(world, blocks=((0.50, 0.50), (0.56, 0.50), PURPLE))
    assert close(at(crowded, 0.52, 0.50)).held == 0
    assert close(at(crowded, 0.54, 0.50)).held == 1


def test_a_closed_gripper_grasps_nothing(world: World) -> None:
    closed = close(world)
    assert closed.held is None
    assert at(closed, *RED).step(action(grip=-1)).held is None


def test_a_half_open_gripper_that_closes_again_keeps_its_block(world: World) -> None:
    """It keeps the block even if another one is nearer to the gripper's new position."""
    crowded = replace(world, blocks=((0.5, 0.5), (0.53, 0.5), PURPLE), gripper=(0.5, 0.5), opening=0.0, held=0)
    assert crowded.step(action(1.0, grip=1)).step(action(1.0, grip=-1)).held == 0


def test_a_held_block_follows_and_the_others_stay(world: World) -> None:
    held = close(at(world, *RED))
    for _ in range(5):
        held = held.step(action(1.0, 0.5, grip=-1))
    assert held.blocks[0] == held.gripper == pytest.approx((RED[0] + 5 * STEP, RED[1] + 2.5 * STEP))
    assert held.blocks[1:] == world.blocks[1:]


def test_opening_takes_two_steps_and_releases_the_block(world: World) -> None:
    held = close(at(world, *RED))
    half = held.step(action(grip=1))
    assert (half.opening, half.held) == (0.5, 0)
    open_ = half.step(action(grip=1))
    assert (open_.opening, open_.held) == (1.0, None)
    away = open_.step(action(1.0, 1.0))
    assert away.blocks[0] == open_.blocks[0]


def test_success_requires_the_block_to_be_released(world: World) -> None:
    held = close(at(world, *RED))
    carried = replace(held, gripper=YELLOW_ZONE, blocks=(YELLOW_ZONE, *held.blocks[1:]))
    assert not carried.success
    half = carried.step(action(grip=1))
    assert not half.success
    assert half.step(action(grip=1)).success


def test_another_block_in_the_zone_does_not_count_as_success(world: World) -> None:
    assert not replace(world, blocks=(RED, YELLOW_ZONE, PURPLE)).success


def test_done_is_the_final_world_of_a_perfect_demonstration(world: World) -> None:
    done = world.done()
    assert done.success
    assert (done.blocks[0], done.gripper, done.opening, done.held) == (YELLOW_ZONE, YELLOW_ZONE, 1.0, None)
    assert done.blocks[1:] == world.blocks[1:]


def test_stepping_does_not_change_the_old_world(world: World) -> None:
    before = replace(world)
    world.step(action(1, 1, -1))
    assert world == before

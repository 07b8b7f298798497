"""Test that images show every object in its colour and position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imagewam_cli.sim.tabletop.render import (
    BLOCK_RGB,
    BORDER_RGB,
    GRIPPER_RGB,
    TABLE_RGB,
    WRIST_SPAN,
    ZONE_RGB,
    render,
)
from imagewam_cli.sim.tabletop.scene import ZONE_HALF, sample_scene
from imagewam_cli.sim.tabletop.world import World
from tests.support.scenes import BLUE_ZONE, GREEN, PURPLE, RED, RED_ON_YELLOW, YELLOW_ZONE, scene_with, without_gripper


def color_at(picture: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    """Return the pixel at table position (x, y) of a top view."""
    size = picture.shape[0]
    return tuple(int(v) for v in picture[int(y * size), int(x * size)])


@pytest.fixture
def world() -> World:
    return World.start(scene_with(RED_ON_YELLOW))


@pytest.mark.parametrize("size", [64, 128, 200])
def test_every_object_is_drawn_at_its_position(world: World, size: int) -> None:
    picture = render(world, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    for color, place in (("red", RED), ("green", GREEN), ("purple", PURPLE)):
        assert color_at(picture, *place) == BLOCK_RGB[color]
    assert color_at(picture, *BLUE_ZONE) == ZONE_RGB["blue"]
    assert color_at(picture, *YELLOW_ZONE) == ZONE_RGB["yellow"]
    assert color_at(picture, 0.05, 0.95) == TABLE_RGB


def test_a_zone_has_a_border(world: World) -> None:
    assert color_at(render(world, 512), BLUE_ZONE[0] - ZONE_HALF + 0.006, BLUE_ZONE[1]) == BORDER_RGB["blue"]


def test_blocks_of_sampled_scenes_are_drawn_at_their_positions() -> None:
    for seed in range(20):
        scene = sample_scene(seed)
        picture = render(without_gripper(World.start(scene)))
        for block in scene.blocks:
            assert color_at(picture, block.x, block.y) == BLOCK_RGB[block.color], f"seed {seed}, {block}"
        for zone in scene.zones:
            assert color_at(picture, zone.x, zone.y) == ZONE_RGB[zone.color], f"seed {seed}, {zone}"


def test_a_moved_block_is_drawn_at_its_new_position(world: World) -> None:
    picture = render(replace(world, blocks=(YELLOW_ZONE, *world.blocks[1:])))
    assert color_at(picture, *YELLOW_ZONE) == BLOCK_RGB["red"]
    assert color_at(picture, *RED) == TABLE_RGB


def test_the_jaws_show_the_opening(world: World) -> None:
    def width(opening: float) -> float:
        picture = render(replace(world, gripper=(0.5, 0.5), opening=opening))
        columns = np.nonzero((picture == GRIPPER_RGB).all(-1).any(0))[0]
        return float(columns[-1] - columns[0])

    assert width(0.0) < width(0.5) < width(1.0)


def test_the_jaws_are_centred_on_the_gripper(world: World) -> None:
    picture = render(replace(world, gripper=(0.5, 0.5)))
    rows, columns = np.nonzero((picture == GRIPPER_RGB).all(-1))
    assert columns.mean() == pytest.approx(64, abs=1)
    assert rows.mean() == pytest.approx(64, abs=1)
    assert color_at(picture, 0.5, 0.5) == TABLE_RGB


def test_the_wrist_camera_is_centred_on_the_gripper(world: World) -> None:
    for color, place in (("red", RED), ("green", GREEN)):
        picture = render(replace(world, gripper=place), 128, "wrist")
        assert picture.shape == (128, 128, 3)
        assert tuple(picture[64, 64]) == BLOCK_RGB[color]


def test_the_wrist_camera_magnifies(world: World) -> None:
    there = replace(world, gripper=RED)
    areas = [(render(there, 128, camera) == BLOCK_RGB["red"]).all(-1).sum() for camera in ("top", "wrist")]
    assert areas[1] / areas[0] == pytest.approx(1 / WRIST_SPAN**2, rel=0.1)


def test_a_block_above_the_gripper_is_above_in_the_wrist_camera(world: World) -> None:
    picture = render(replace(world, gripper=(RED[0], RED[1] + 0.13)), 128, "wrist")
    rows, columns = np.nonzero((picture == BLOCK_RGB["red"]).all(-1))
    assert rows.mean() == pytest.approx(64 - 0.13 / WRIST_SPAN * 128, abs=1)
    assert columns.mean() == pytest.approx(64, abs=1)


def test_equal_worlds_give_equal_images(world: World) -> None:
    assert np.array_equal(render(world), render(replace(world, steps=17)))

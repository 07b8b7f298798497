"""Draw pictures of a world with numpy and Pillow.

The camera `top` shows the whole table, `wrist` the area around the gripper. Blocks are saturated and zones pale, with a
border in between, so a red block on a red zone stays visible.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import UnknownNameError
from imagewam_cli.sim.tabletop.scene import BLOCK_HALF, ZONE_HALF
from imagewam_cli.sim.tabletop.world import World

RGB = tuple[int, int, int]
CAMERAS = ("top", "wrist")

BLOCK_RGB: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (36, 84, 208),
    "yellow": (240, 200, 24),
    "purple": (140, 50, 170),
    "orange": (240, 125, 20),
}
ZONE_RGB: dict[str, RGB] = {
    "red": (240, 180, 176),
    "green": (178, 222, 184),
    "blue": (178, 200, 240),
    "yellow": (248, 236, 168),
}
BORDER_RGB: dict[str, RGB] = {
    "red": (222, 120, 118),
    "green": (118, 186, 130),
    "blue": (118, 150, 224),
    "yellow": (226, 208, 110),
}
TABLE_RGB: RGB = (224, 216, 204)
GRIPPER_RGB: RGB = (44, 46, 54)

WRIST_SPAN = 0.4
"""Width of the wrist camera's picture in table units."""

_SUPERSAMPLING = 2


def render(world: World, size: int = 128, camera: str = "top") -> UInt8Image:
    """Draw the picture of `camera` ("top" or "wrist"), uint8 (size, size, 3)."""
    if camera not in CAMERAS:
        raise UnknownNameError("camera", camera, CAMERAS)
    if camera == "wrist":
        x, y = world.gripper
        return _View(x - WRIST_SPAN / 2, y - WRIST_SPAN / 2, WRIST_SPAN, size).draw(world)
    return _View(0.0, 0.0, 1.0, size).draw(world)


class _View:
    """A square window of the table: left and top edge, span in table units, size in pixels."""

    def __init__(self, left: float, top: float, span: float, size: int) -> None:
        self.left, self.top = left, top
        self.pixels = size * _SUPERSAMPLING
        self.scale = self.pixels / span

    def draw(self, world: World) -> UInt8Image:
        image = Image.new("RGB", (self.pixels, self.pixels), TABLE_RGB)
        pen = ImageDraw.Draw(image)
        for zone in world.scene.zones:
            pen.rectangle(
                self._box(zone.x, zone.y, ZONE_HALF, ZONE_HALF),
                fill=ZONE_RGB[zone.color],
                outline=BORDER_RGB[zone.color],
                width=max(1, round(0.012 * self.scale)),
            )
        drawing_order = sorted(range(len(world.blocks)), key=lambda i: i == world.held)  # a held block last, on top
        for i in drawing_order:
            block, (x, y) = world.scene.blocks[i], world.blocks[i]
            self._block(pen, block.shape, BLOCK_RGB[block.color], x, y)
        self._gripper(pen, world)
        return np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.uint8)

    def _block(self, pen: ImageDraw.ImageDraw, shape: str, color: RGB, x: float, y: float) -> None:
        if shape == "square":
            pen.rectangle(self._box(x, y, 0.92 * BLOCK_HALF, 0.92 * BLOCK_HALF), fill=color)
        elif shape == "circle":
            pen.ellipse(self._box(x, y, BLOCK_HALF, BLOCK_HALF), fill=color)
        else:
            corners = [(x, y - 1.2 * BLOCK_HALF), (x - 1.15 * BLOCK_HALF, y + 0.85 * BLOCK_HALF)]
            corners.append((x + 1.15 * BLOCK_HALF, y + 0.85 * BLOCK_HALF))
            pen.polygon([self._point(*c) for c in corners], fill=color)

    def _gripper(self, pen: ImageDraw.ImageDraw, world: World) -> None:
        x, y = world.gripper
        gap = BLOCK_HALF * (1.25 + 0.75 * world.opening)
        for side in (-1, 1):
            pen.rectangle(self._box(x + side * gap, y, 0.012, 0.05), fill=GRIPPER_RGB)
            pen.rectangle(self._box(x + side * (gap + 0.02), y, 0.02, 0.012), fill=GRIPPER_RGB)

    def _point(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.left) * self.scale, (y - self.top) * self.scale

    def _box(self, x: float, y: float, half_w: float, half_h: float) -> tuple[float, float, float, float]:
        return (*self._point(x - half_w, y - half_h), *self._point(x + half_w, y + half_h))

"""Augmented views of a row's pictures, each a function of (seed, dataset row, variant, camera) alone.

What is drawn, and how far, follows the published training on LIBERO (arXiv 2606.19531): a crop that is resized back and
a turn, always; and for about two thirds of the views a change of colours, of exposure and noise, or of both. The state
and the action stay what they are.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from imagewam_cli.data.types import Float32Array, Row, UInt8Image


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How many views of each row there are, and what may befall them. Ranges are symmetric around no change."""

    variants: int = 1
    """Views of a row; the first is the picture itself."""
    seed: int = 0
    changed: float = 0.65
    """Share of views that get other colours, exposure and noise, or both."""
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.25
    hue: float = 0.04
    """Of a whole turn of the colour circle."""
    gamma: tuple[float, float] = (0.8, 1.25)
    exposure: float = 0.25
    """In stops: factors of 2."""
    noise: float = 0.015
    """Standard deviation, of the range from black to white."""
    crop: float = 0.92
    """Least side of the crop, of the picture's."""
    turn: float = 8.0
    """Degrees."""

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"a row has at least one view, not {self.variants}")


AS_RECORDED = Augmentation()
"""One view of each row."""


def augmented(rows: Iterable[Row], augmentation: Augmentation) -> Iterator[Row]:
    """Every view of every row, those of a row one after another."""
    for row in rows:
        yield row
        for variant in range(1, augmentation.variants):
            images = {
                camera: _view(picture, augmentation, _generator(augmentation.seed, row.row, variant, camera))
                for camera, picture in row.images.items()
            }
            yield dataclasses.replace(row, images=images, variant=variant)


def _generator(seed: int, row: int, variant: int, camera: str) -> np.random.Generator:
    return np.random.default_rng([seed, row, variant, zlib.crc32(camera.encode())])


def _view(picture: UInt8Image, a: Augmentation, rng: np.random.Generator) -> UInt8Image:
    kind = rng.choice(["colours", "corruption", "both"]) if rng.random() < a.changed else "none"
    moved = _moved(Image.fromarray(picture), a, rng)
    if kind in ("colours", "both"):
        moved = _coloured(moved, a, rng)
    values = np.asarray(moved, np.float32) / np.float32(255)
    if kind in ("corruption", "both"):
        values = _corrupted(values, a, rng)
    return np.round(255 * values.clip(0, 1)).astype(np.uint8)


def _moved(picture: Image.Image, a: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Turned, with the mean colour where nothing was seen, then cropped and resized back."""
    mean = tuple(int(x) for x in np.asarray(picture).reshape(-1, 3).mean(0).round())
    turned = picture.rotate(rng.uniform(-a.turn, a.turn), Image.Resampling.BILINEAR, fillcolor=mean)
    side = rng.uniform(a.crop, 1.0)
    width, height = (side * n for n in picture.size)
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return turned.resize(picture.size, Image.Resampling.BILINEAR, box=box)


def _coloured(picture: Image.Image, a: Augmentation, rng: np.random.Generator) -> Image.Image:
    for enhance, most in (
        (ImageEnhance.Brightness, a.brightness),
        (ImageEnhance.Contrast, a.contrast),
        (ImageEnhance.Color, a.saturation),
    ):
        picture = enhance(picture).enhance(rng.uniform(1 - most, 1 + most))
    hue, saturation, value = picture.convert("HSV").split()
    angle = round(256 * rng.uniform(-a.hue, a.hue))
    turned = hue.point([(i + angle) % 256 for i in range(256)])  # the colour circle closes
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _corrupted(values: Float32Array, a: Augmentation, rng: np.random.Generator) -> Float32Array:
    """(H, W, 3) from 0 to 1."""
    lit = values * 2 ** rng.uniform(-a.exposure, a.exposure)
    curved = lit.clip(0, 1) ** rng.uniform(*a.gamma)
    return (curved + rng.normal(0, a.noise, values.shape)).astype(np.float32)

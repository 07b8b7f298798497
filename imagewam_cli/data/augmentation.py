"""Augment the images of a row. A view depends only on (seed, dataset row, variant, camera).

Kinds and ranges follow the published training on LIBERO (arXiv 2606.19531): every augmented view is rotated, cropped
and resized back; about two thirds also get a change of color, of exposure with noise, or of both. State and action do
not change.
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
    """Number of views per row, and the ranges of the changes, each symmetric around no change."""

    variants: int = 1
    """Number of views per row; the first is the recorded image."""
    seed: int = 0
    changed: float = 0.65
    """Fraction of augmented views with a change of color, of exposure with noise, or of both."""
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.25
    hue: float = 0.04
    """Maximum change of hue, as a fraction of the color circle."""
    gamma: tuple[float, float] = (0.8, 1.25)
    exposure: float = 0.25
    """Maximum change of exposure in stops (factors of 2)."""
    noise: float = 0.015
    """Standard deviation of the noise; 1 is the range from black to white."""
    crop: float = 0.92
    """Minimum side of the crop, as a fraction of the image's side."""
    turn: float = 8.0
    """Maximum rotation in degrees."""

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"variants must be at least 1, got {self.variants}")


NO_AUGMENTATION = Augmentation()
"""No augmentation: one view per row, the recorded image."""


def augmented(rows: Iterable[Row], augmentation: Augmentation) -> Iterator[Row]:
    """Yield every view of every row; the views of a row are consecutive."""
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
    kind = rng.choice(["colors", "corruption", "both"]) if rng.random() < a.changed else "none"
    view = _geometric(Image.fromarray(picture), a, rng)
    if kind in ("colors", "both"):
        view = _color_jitter(view, a, rng)
    values = np.asarray(view, np.float32) / np.float32(255)
    if kind in ("corruption", "both"):
        values = _exposure_and_noise(values, a, rng)
    return np.round(255 * values.clip(0, 1)).astype(np.uint8)


def _geometric(picture: Image.Image, a: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Rotate (empty corners get the mean color), crop, and resize back."""
    mean = tuple(int(x) for x in np.asarray(picture).reshape(-1, 3).mean(0).round())
    turned = picture.rotate(rng.uniform(-a.turn, a.turn), Image.Resampling.BILINEAR, fillcolor=mean)
    side = rng.uniform(a.crop, 1.0)
    width, height = (side * n for n in picture.size)
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return turned.resize(picture.size, Image.Resampling.BILINEAR, box=box)


def _color_jitter(picture: Image.Image, a: Augmentation, rng: np.random.Generator) -> Image.Image:
    for enhance, change in (
        (ImageEnhance.Brightness, a.brightness),
        (ImageEnhance.Contrast, a.contrast),
        (ImageEnhance.Color, a.saturation),
    ):
        picture = enhance(picture).enhance(rng.uniform(1 - change, 1 + change))
    hue, saturation, value = picture.convert("HSV").split()
    angle = round(256 * rng.uniform(-a.hue, a.hue))
    turned = hue.point([(i + angle) % 256 for i in range(256)])  # hue wraps around
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _exposure_and_noise(values: Float32Array, a: Augmentation, rng: np.random.Generator) -> Float32Array:
    """Change exposure and gamma and add noise. values: (H, W, 3) in [0, 1]."""
    exposed = values * 2 ** rng.uniform(-a.exposure, a.exposure)
    gamma_corrected = exposed.clip(0, 1) ** rng.uniform(*a.gamma)
    return (gamma_corrected + rng.normal(0, a.noise, values.shape)).astype(np.float32)

"""The cameras' pictures as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError


def composed(
    images: Mapping[str, UInt8Image], cameras: Sequence[str], size: tuple[int, int], layout: str | None = None
) -> UInt8Image:
    """uint8 (H, W, 3) of `size` (height, width), each camera resized (bilinear) to its place.

    layout: `head-over-wrists`, the first of three cameras in the upper two thirds and the others side by side below;
    any other, all side by side at an equal share of the width.

    Raises:
        DatasetError: a camera has no picture.
    """
    missing = [c for c in cameras if c not in images]
    if missing:
        raise DatasetError(f"no picture of camera {missing[0]!r}", f"there are: {', '.join(images) or 'none'}")
    pictures, (height, width) = [images[c] for c in cameras], size
    if layout == "head-over-wrists":
        head, *wrists = pictures
        return np.concatenate([_row([head], height * 2 // 3, width), _row(wrists, height // 3, width)])
    return _row(pictures, height, width)


def _row(pictures: Sequence[UInt8Image], height: int, width: int) -> UInt8Image:
    """Side by side in (height, width, 3), at equal shares of the width."""
    tile = (width // len(pictures), height)
    return np.concatenate([_resized(picture, tile) for picture in pictures], axis=1)


def _resized(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """size: (width, height)."""
    picture = Image.fromarray(image)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))

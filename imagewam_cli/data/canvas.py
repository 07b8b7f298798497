"""The cameras' pictures as one: each at an equal share of the width, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError


def side_by_side(images: Mapping[str, UInt8Image], cameras: Sequence[str], size: tuple[int, int]) -> UInt8Image:
    """uint8 (H, W, 3) of `size` (height, width), each camera resized (bilinear) to (H, W / cameras).

    Raises:
        DatasetError: a camera has no picture.
    """
    missing = [c for c in cameras if c not in images]
    if missing:
        raise DatasetError(f"no picture of camera {missing[0]!r}", f"there are: {', '.join(images) or 'none'}")
    tile = (size[1] // len(cameras), size[0])
    return np.concatenate([np.asarray(_resized(images[c], tile)) for c in cameras], axis=1)


def _resized(image: UInt8Image, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)

"""Arrange the pictures of several cameras into the editor's input. Add new layouts here.

The settings of a cache record a layout by its name. Each layout determines the size of the composed picture, what its
sides must be multiples of, and whether the editor sees one picture or one per camera.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imagewam_cli.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from imagewam_cli.data.types import UInt8Image

Size = tuple[int, int]
"""(height, width) in pixels."""


class CameraLayout(abc.ABC):
    """One way to arrange the cameras' pictures."""

    name: str
    in_one_row: bool
    """Whether the composed picture is the cameras side by side, at equal widths."""

    @abc.abstractmethod
    def default_size(self, camera: Size, count: int) -> Size:
        """Return the size of the composed picture of `count` cameras whose own pictures have the size `camera`."""

    @abc.abstractmethod
    def granularity(self, multiple: int, count: int) -> Size:
        """Return what height and width must be multiples of, if each camera's sides must be multiples of `multiple`.

        Raises:
            UsageError: the layout does not take `count` cameras.
        """

    @abc.abstractmethod
    def reference_sizes(self, size: Size, count: int) -> tuple[Size, ...]:
        """Return the size of each reference picture that the editor sees in a composed picture of `size`."""

    def compose(self, images: Mapping[str, UInt8Image], cameras: Sequence[str], size: Size) -> UInt8Image:
        """Return uint8 (H, W, 3) of `size`, each camera's picture resized (bilinear) to its area.

        Raises:
            DatasetError: a camera has no picture.
        """
        missing = [c for c in cameras if c not in images]
        if missing:
            raise DatasetError(
                f"no picture of camera {missing[0]!r}", f"available cameras: {', '.join(images) or 'none'}"
            )
        return self._compose([images[c] for c in cameras], size)

    @abc.abstractmethod
    def _compose(self, pictures: Sequence[UInt8Image], size: Size) -> UInt8Image: ...


class _SideBySide(CameraLayout):
    """Cameras in a row, at equal widths: one picture, or one reference picture per camera."""

    in_one_row = True

    def __init__(self, name: str, *, one_picture: bool) -> None:
        self.name, self._one_picture = name, one_picture

    def default_size(self, camera: Size, count: int) -> Size:
        height, width = camera
        return height, width * count

    def granularity(self, multiple: int, count: int) -> Size:
        return multiple, multiple * count

    def reference_sizes(self, size: Size, count: int) -> tuple[Size, ...]:
        height, width = size
        pictures = 1 if self._one_picture else count
        return ((height, width // pictures),) * pictures

    def _compose(self, pictures: Sequence[UInt8Image], size: Size) -> UInt8Image:
        return _row(pictures, *size)


class _HeadOverWrists(CameraLayout):
    """One picture of three cameras: the first in the upper two thirds, the others side by side below."""

    name = "head-over-wrists"
    in_one_row = False

    def default_size(self, camera: Size, count: int) -> Size:
        height, width = camera
        return height * 3 // 2, width

    def granularity(self, multiple: int, count: int) -> Size:
        if count != 3:
            raise UsageError(f"camera layout {self.name!r} takes 3 cameras, got {count}", "choose three with --camera")
        return 3 * multiple, 2 * multiple

    def reference_sizes(self, size: Size, count: int) -> tuple[Size, ...]:
        return (size,)

    def _compose(self, pictures: Sequence[UInt8Image], size: Size) -> UInt8Image:
        import numpy as np

        (head, *wrists), (height, width) = pictures, size
        return np.concatenate([_row([head], height * 2 // 3, width), _row(wrists, height // 3, width)])


TILE = _SideBySide("tile", one_picture=True)
SEPARATE = _SideBySide("separate", one_picture=False)
HEAD_OVER_WRISTS = _HeadOverWrists()
CAMERA_LAYOUTS: Mapping[str, CameraLayout] = {layout.name: layout for layout in (TILE, SEPARATE, HEAD_OVER_WRISTS)}


def recorded_layout(name: str | None) -> CameraLayout:
    """Return the layout of that name. None means `tile`: old records have no layout name."""
    return TILE if name is None else CAMERA_LAYOUTS[name]


def _row(pictures: Sequence[UInt8Image], height: int, width: int) -> UInt8Image:
    """Return the pictures side by side in (height, width, 3), at equal widths."""
    import numpy as np

    tile = (width // len(pictures), height)
    return np.concatenate([_resize(picture, tile) for picture in pictures], axis=1)


def _resize(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """Resize a picture, bilinear. size: (width, height), in Pillow's order."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(image)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))

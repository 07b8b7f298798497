"""`data.camera_layout`: where each camera's picture goes."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.data.camera_layout import CAMERA_LAYOUTS, HEAD_OVER_WRISTS, SEPARATE, TILE, recorded_layout
from imagewam_cli.errors import DatasetError, UsageError

IMAGES = {name: np.full((8, 8, 3), i, np.uint8) for i, name in enumerate(("head", "left", "right"), start=1)}


def areas(picture: np.ndarray) -> list[list[int]]:
    """The picture in blocks of 4 x 4 pixels, each of one camera."""
    assert picture.dtype == np.uint8
    return picture[::4, ::4, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [TILE, SEPARATE])
def test_cameras_are_side_by_side(layout: object) -> None:
    assert areas(layout.compose(IMAGES, ("right", "head"), (4, 8))) == [[3, 1]]  # type: ignore[attr-defined]


def test_the_head_is_over_the_wrists() -> None:
    assert areas(HEAD_OVER_WRISTS.compose(IMAGES, tuple(IMAGES), (12, 8))) == [[1, 1], [1, 1], [2, 3]]


@pytest.mark.parametrize(
    ("layout", "count", "size", "granularity", "references"),
    [
        (TILE, 2, (64, 128), (16, 32), ((64, 128),)),
        (SEPARATE, 2, (64, 128), (16, 32), ((64, 64), (64, 64))),
        (HEAD_OVER_WRISTS, 3, (96, 64), (48, 32), ((96, 64),)),
    ],
)
def test_sizes(layout: object, count: int, size: object, granularity: object, references: object) -> None:
    assert layout.default_size((64, 64), count) == size  # type: ignore[attr-defined]
    assert layout.granularity(16, count) == granularity  # type: ignore[attr-defined]
    assert layout.reference_sizes(size, count) == references  # type: ignore[attr-defined]


def test_what_cannot_be_composed_is_refused() -> None:
    with pytest.raises(DatasetError, match="no picture of camera 'belly'"):
        TILE.compose(IMAGES, ("head", "belly"), (4, 8))
    with pytest.raises(UsageError, match="for 3 cameras, not 2"):
        HEAD_OVER_WRISTS.granularity(16, 2)


def test_recorded_names() -> None:
    assert {name: recorded_layout(name) for name in CAMERA_LAYOUTS} == CAMERA_LAYOUTS
    assert recorded_layout(None) is TILE

"""Test `data.camera_layout`: the position and size of each camera's image."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.data.camera_layout import CAMERA_LAYOUTS, HEAD_OVER_WRISTS, SEPARATE, TILE, recorded_layout
from imagewam_cli.errors import DatasetError, UsageError

IMAGES = {name: np.full((8, 8, 3), i, np.uint8) for i, name in enumerate(("head", "left", "right"), start=1)}


def areas(picture: np.ndarray) -> list[list[int]]:
    """Return one value per block of 4 x 4 pixels; it identifies the block's camera."""
    assert picture.dtype == np.uint8
    return picture[::4, ::4, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [TILE, SEPARATE])
def test_cameras_are_side_by_side(layout: object) -> None:
    assert areas(layout.compose(IMAGES, ("right", "head"), (4, 8))) == [[3, 1]]  # type: ignore[attr-defined]


def test_the_head_image_is_above_the_wrist_images() -> None:
    assert areas(HEAD_OVER_WRISTS.compose(IMAGES, tuple(IMAGES), (12, 8))) == [[1, 1], [1, 1], [2, 3]]


@pytest.mark.parametrize(
    ("layout", "count", "size", "granularity", "references"),
    [
        (TILE, 2, (64, 128), (16, 32), ((64, 128),)),
        (SEPARATE, 2, (64, 128), (16, 32), ((64, 64), (64, 64))),
        (HEAD_OVER_WRISTS, 3, (96, 64), (48, 32), ((96, 64),)),
    ],
)
def test_default_size_granularity_and_reference_sizes(
    layout: object, count: int, size: object, granularity: object, references: object
) -> None:
    assert layout.default_size((64, 64), count) == size  # type: ignore[attr-defined]
    assert layout.granularity(16, count) == granularity  # type: ignore[attr-defined]
    assert layout.reference_sizes(size, count) == references  # type: ignore[attr-defined]


def test_a_missing_camera_and_a_wrong_camera_count_are_refused() -> None:
    with pytest.raises(DatasetError, match="no picture of camera 'belly'"):
        TILE.compose(IMAGES, ("head", "belly"), (4, 8))
    with pytest.raises(UsageError, match="takes 3 cameras, got 2"):
        HEAD_OVER_WRISTS.granularity(16, 2)


def test_a_layout_is_found_by_its_recorded_name() -> None:
    assert {name: recorded_layout(name) for name in CAMERA_LAYOUTS} == CAMERA_LAYOUTS
    assert recorded_layout(None) is TILE

"""Test features of `meta/info.json`: their shapes and names in old and new datasets."""

from __future__ import annotations

import pytest

from imagewam_cli.data.lerobot.info import Feature, _flat_names, _is_depth
from imagewam_cli.errors import DatasetError


def feature(shape: tuple[int, ...], names: tuple[str, ...] = (), key: str = "observation.images.top") -> Feature:
    return Feature(key=key, dtype="video", shape=shape, names=names, is_depth=False)


@pytest.mark.parametrize(
    ("shape", "names", "size"),
    [
        ((480, 640, 3), ("height", "width", "channels"), (480, 640)),
        ((480, 640, 3), ("height", "width", "channel"), (480, 640)),
        ((3, 480, 640), ("channels", "height", "width"), (480, 640)),
        # These sizes could all be channel counts, so only the axis names decide.
        ((3, 8, 3), ("height", "width", "channels"), (3, 8)),
        ((3, 8, 3), ("channels", "height", "width"), (8, 3)),
        ((640, 480, 3), ("width", "height", "channels"), (480, 640)),
        ((480, 640, 3), (), (480, 640)),
        ((3, 480, 640), (), (480, 640)),
    ],
)
def test_axis_names_take_precedence_over_axis_order(
    shape: tuple[int, ...], names: tuple[str, ...], size: tuple[int, int]
) -> None:
    assert feature(shape, names).image_size() == size


def test_an_image_feature_has_three_axes() -> None:
    with pytest.raises(DatasetError, match=r"'observation.images.top' has shape \[7\], which is not an image"):
        feature((7,)).image_size()


@pytest.mark.parametrize(
    ("names", "flat"),
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["a", "b"]}, ("a", "b")),
        ({"left": ["a"], "right": ["b"]}, ("a", "b")),
        ({"y": 1, "x": 0}, ("x", "y")),
        (None, ()),
    ],
)
def test_names_are_read_from_several_forms(names: object, flat: tuple[str, ...]) -> None:
    assert _flat_names(names) == flat


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("observation.images.top", "top"),
        ("observation.image", "image"),
        ("wrist_image", "wrist_image"),
        ("observation.images.left.wrist", "left.wrist"),
    ],
)
def test_cameras_are_named_without_the_prefix(key: str, name: str) -> None:
    assert feature((8, 8, 3), key=key).camera_name == name


@pytest.mark.parametrize(
    "entry",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
    ],
)
def test_depth_is_marked_in_three_ways(entry: dict[str, object]) -> None:
    assert _is_depth(entry)
    assert not _is_depth({"info": {"is_depth_map": False}})

"""Test that depth never becomes a color picture: left out aloud by default, refused when it is asked for."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imagewam_cli.data.lerobot.reader import LeRobotDataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.errors import DatasetError, ImagewamWarning
from tests.support.recordings import CAMERAS, edit_json, edit_table, set_column

DATA = "data/chunk-000/file-000.parquet"
DEPTH = "observation.images.wrist"
SIZE = CAMERAS["wrist"]


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def with_depth(original: Path, root: Path, pixels: np.ndarray, kind: str, feature: dict[str, Any]) -> Path:
    """Copy a dataset of PNG pictures and replace those of one camera. feature: changes of its entry in info.json."""
    shutil.copytree(original, root)
    edit_json(root / "meta/info.json", lambda info: info["features"][DEPTH].update(feature))
    cell = {"bytes": encoded(pixels, kind), "path": None}
    edit_table(root / DATA, lambda table: set_column(table, DEPTH, [cell] * table.num_rows))
    return root


def sixteen_bits() -> np.ndarray:
    return np.full(SIZE, 1500, np.uint16)


def floats() -> np.ndarray:
    return np.full(SIZE, 1.5, np.float32)


@pytest.mark.parametrize(
    ("pixels", "kind", "feature", "why"),
    [
        (sixteen_bits, "PNG", {"shape": [*SIZE, 1]}, "one channel of 16 bits"),
        (sixteen_bits, "PNG", {"shape": [1, *SIZE], "names": ["channels", "height", "width"]}, "16 bits"),
        (sixteen_bits, "PNG", {"shape": list(SIZE), "names": ["height", "width"]}, "one channel of 16 bits"),
        (floats, "TIFF", {"shape": [*SIZE, 1]}, "one channel of floats"),
        (sixteen_bits, "PNG", {"info": {"is_depth_map": True}}, "depth"),
        (sixteen_bits, "PNG", {"video_info": {"video.is_depth_map": True}}, "depth"),
        (sixteen_bits, "PNG", {"dtype": "depth"}, "depth"),
    ],
)
def test_depth_pictures_are_left_out_aloud_or_refused(
    v30_pictures: Path,
    tmp_path: Path,
    pixels: Callable[[], np.ndarray],
    kind: str,
    feature: dict[str, Any],
    why: str,
) -> None:
    root = with_depth(v30_pictures, tmp_path / "set", pixels(), kind, feature)
    with pytest.warns(ImagewamWarning, match=rf"these cameras are left out: 'wrist' \(.*{why}\)"):
        dataset = LeRobotDataset(root)
    assert list(dataset.info.cameras) == ["top"]
    assert [list(row.images) for row in dataset.rows()] == [["top"]] * 16
    for name in ("wrist", DEPTH):
        with pytest.raises(DatasetError, match=r"camera '.*wrist' holds .*depth, .*not color"):
            LeRobotDataset(root, KeyMap(cameras=("top", name)))


def test_no_word_is_said_about_depth_if_cameras_are_named(
    v30_pictures: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    root = with_depth(v30_pictures, tmp_path / "set", sixteen_bits(), "PNG", {"dtype": "depth"})
    assert len(list(LeRobotDataset(root, KeyMap(cameras=("top",))).rows())) == 16
    assert not recwarn.list


def test_gray_pictures_of_8_bits_are_cameras(v30_pictures: Path, tmp_path: Path) -> None:
    gray = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE)
    root = with_depth(v30_pictures, tmp_path / "set", gray, "PNG", {"shape": [*SIZE, 1]})
    row = next(LeRobotDataset(root).rows())
    np.testing.assert_array_equal(row.images["wrist"], np.stack([gray] * 3, axis=-1))


def test_16_bit_pictures_of_a_color_feature_are_refused(v30_pictures: Path, tmp_path: Path) -> None:
    root = with_depth(v30_pictures, tmp_path / "set", sixteen_bits(), "PNG", {})
    with pytest.raises(DatasetError, match=r"frame 0: the picture of '.*wrist' holds one channel of 16 bits"):
        next(LeRobotDataset(root).rows())


def test_the_kind_is_told_though_the_first_files_are_missing(v30_pictures: Path, tmp_path: Path) -> None:
    root = with_depth(v30_pictures, tmp_path / "set", sixteen_bits(), "PNG", {"shape": [*SIZE, 1]})
    edit_table(root / DATA, lambda table: table.filter(pa.compute.greater(table["episode_index"], 0)))
    with pytest.warns(ImagewamWarning, match="left out: 'wrist'"):
        assert list(LeRobotDataset(root).info.cameras) == ["top"]


def write_gray_video(path: Path, pix_fmt: str, codec: str, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = SIZE
        stream.pix_fmt = pix_fmt
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full(SIZE, 300 * number, np.uint16), format="gray16le")
            frame.pts = number
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("shape", [[*SIZE, 1], [*SIZE, 3]])
def test_gray_videos_of_more_than_8_bits_are_depth(v30: Path, tmp_path: Path, shape: list[int]) -> None:
    root = Path(shutil.copytree(v30, tmp_path / "set"))
    write_gray_video(root / f"videos/{DEPTH}/chunk-000/file-000.mp4", "gray12le", "libx265", 16)
    edit_json(root / "meta/info.json", lambda info: info["features"][DEPTH].update(shape=shape, info={}))
    if shape[2] == 1:
        with pytest.warns(ImagewamWarning, match=r"left out: 'wrist' \(gray12le frames\)"):
            assert list(LeRobotDataset(root).info.cameras) == ["top"]
    else:
        with pytest.raises(DatasetError, match=r"one channel of more than 8 bits \(gray12le\), not colors"):
            LeRobotDataset(root).rows()


def test_the_pixel_format_in_the_metadata_tells_depth(v30: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v30, tmp_path / "set"))
    edit_json(root / "meta/info.json", lambda info: info["features"][DEPTH].update(info={"video.pix_fmt": "gray12le"}))
    with pytest.warns(ImagewamWarning, match=r"left out: 'wrist' \(depth\)"):
        assert list(LeRobotDataset(root).info.cameras) == ["top"]

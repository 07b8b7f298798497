"""Test that `data.pictures` reads images back unchanged and frees the disk space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.data.pictures import PictureFile, picture_bytes
from imagewam_cli.errors import RunError

CAMERAS = {"top": (4, 6), "wrist.left": (3, 2)}


def pictures(row: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(row)
    return {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in CAMERAS.items()}


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    file = PictureFile(tmp_path, CAMERAS, 5)
    for row in range(5):
        file.add(pictures(row))
    for order in ([3], [4, 0, 2, 0], []):
        read = file.read(np.array(order, np.int64))
        assert len(read) == len(order)
        for row, images in zip(order, read, strict=True):
            assert images.keys() == CAMERAS.keys()
            assert all(np.array_equal(images[name], picture) for name, picture in pictures(row).items())
    file.close()


def test_images_stay_valid_after_the_file_is_closed(tmp_path: Path) -> None:
    file = PictureFile(tmp_path, CAMERAS, 1)
    file.add(pictures(0))
    (read,) = file.read(np.array([0]))
    file.close()
    assert np.array_equal(read["top"], pictures(0)["top"])


def test_the_file_has_no_name_so_a_killed_process_leaves_none(tmp_path: Path) -> None:
    file = PictureFile(tmp_path, CAMERAS, 1)
    file.add(pictures(0))
    file.read(np.array([0]))
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of_a_row = (4 * 6 + 3 * 2) * 3
    assert picture_bytes(CAMERAS) == bytes_of_a_row
    rows = 10**9 // bytes_of_a_row
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=rows * bytes_of_a_row))
    PictureFile(tmp_path, CAMERAS, rows).close()
    with pytest.raises(RunError, match=rf"pictures of {rows + 1} rows take 1\.00 GB.* has 1\.00 GB") as error:
        PictureFile(tmp_path, CAMERAS, rows + 1)
    assert "--stride" in str(error.value.hint)

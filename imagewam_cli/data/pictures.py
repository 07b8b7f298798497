"""Pictures of chosen rows, decoded once and kept on disk uncompressed, for reading in any order.

A video can be read from front to back only; a training step wants rows from everywhere in it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import RunError


class PictureFile:
    """A file without a name: it takes its bytes from the disk of a folder, and gives them back when it is closed, or
    when the process ends in whatever way."""

    def __init__(self, folder: Path, cameras: Mapping[str, tuple[int, int]], rows: int) -> None:
        """cameras: (height, width) of each; rows: how many will be added.

        Raises:
            RunError: the disk has no room for them.
        """
        self._record = _record(cameras)
        size, free = rows * self._record.itemsize, shutil.disk_usage(folder).free
        if free < size:
            raise RunError(
                f"the pictures of {rows} rows take {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB",
                "free some space, use a larger --stride, or choose a folder on another disk with --out",
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._rows: npt.NDArray[np.void] | None = None

    def add(self, images: Mapping[str, UInt8Image]) -> None:
        """The pictures of the next row."""
        record = np.empty((), self._record)
        for camera in self._record.names or ():
            record[camera] = images[camera]
        self._file.write(record.tobytes())  # not through the map: a full disk is an error here, and a crash there

    def read(self, rows: npt.NDArray[np.int64]) -> list[dict[str, UInt8Image]]:
        """Copies of the pictures of these rows, numbered in the order in which they were added."""
        if self._rows is None:
            self._file.flush()
            self._rows = np.memmap(self._file, self._record, mode="r")
        taken = self._rows[rows]
        return [{camera: taken[camera][i] for camera in self._record.names or ()} for i in range(len(rows))]

    def close(self) -> None:
        """Give the disk back."""
        self._rows = None
        self._file.close()


def picture_bytes(cameras: Mapping[str, tuple[int, int]]) -> int:
    """Of one row."""
    return _record(cameras).itemsize


def _record(cameras: Mapping[str, tuple[int, int]]) -> np.dtype[np.void]:
    return np.dtype([(camera, np.uint8, (*size, 3)) for camera, size in cameras.items()])

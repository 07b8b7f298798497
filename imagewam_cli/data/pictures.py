"""Images of selected rows, decoded once and stored uncompressed on disk, so that they can be read in any order.

A video can only be decoded from front to back, but a training step needs rows from anywhere in it.
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
    """A temporary file without a name. Its space is freed on `close`, or when the process ends for any reason."""

    def __init__(self, folder: Path, cameras: Mapping[str, tuple[int, int]], rows: int) -> None:
        """Check that the disk of `folder` has enough free space. Nothing is reserved.

        Args:
            folder: any folder on the disk to use.
            cameras: camera name -> (height, width).
            rows: number of rows that will be added.

        Raises:
            RunError: the disk has too little free space.
        """
        self._record = _record(cameras)
        size, free = rows * self._record.itemsize, shutil.disk_usage(folder).free
        if free < size:
            raise RunError(
                f"the pictures of {rows} rows take {size / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free",
                "free some space, use a larger --stride, or choose a folder on another disk with --out",
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._rows: npt.NDArray[np.void] | None = None

    def add(self, images: Mapping[str, UInt8Image]) -> None:
        """Append the images of the next row."""
        record = np.empty((), self._record)
        for camera in self._record.names or ():
            record[camera] = images[camera]
        self._file.write(record.tobytes())  # not through the memory map: on a full disk that would crash the process

    def read(self, rows: npt.NDArray[np.int64]) -> list[dict[str, UInt8Image]]:
        """Return copies of the images of these rows; row i is the i-th that was added."""
        if self._rows is None:
            self._file.flush()
            self._rows = np.memmap(self._file, self._record, mode="r")
        taken = self._rows[rows]
        return [{camera: taken[camera][i] for camera in self._record.names or ()} for i in range(len(rows))]

    def close(self) -> None:
        """Free the disk space."""
        self._rows = None
        self._file.close()


def picture_bytes(cameras: Mapping[str, tuple[int, int]]) -> int:
    """Return the bytes that the images of one row take."""
    return _record(cameras).itemsize


def _record(cameras: Mapping[str, tuple[int, int]]) -> np.dtype[np.void]:
    return np.dtype([(camera, np.uint8, (*size, 3)) for camera, size in cameras.items()])

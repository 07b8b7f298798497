"""Read frames that are stored as PNG or JPEG in the data files (features of dtype "image")."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.pixels import PictureKindError, decode_picture
from imagewam_cli.data.lerobot.tables import episode_runs, picture_paths
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError, warn

_BATCH_ROWS = 16
"""Number of encoded images in memory per camera."""


def picture_files(key: str, root: Path, episodes: Sequence[Episode]) -> list[Path]:
    """Return the picture files of an image column, which exist if the pictures are not inside the data files."""
    found: dict[Path, None] = {}
    for data_file, group in itertools.groupby(episodes, key=lambda episode: episode.data_file):
        for name in picture_paths(data_file, list(group), key):
            found[root / name] = None
    return [path for path in found if path.is_file()]


class ImageCamera:
    """Stream the frames of one image column, episode by episode, in small batches."""

    def __init__(self, key: str, size: tuple[int, int], root: Path, episodes: Sequence[Episode]) -> None:
        """key: the camera's feature key; size: (height, width) of every frame; episodes: all that will be read."""
        self.key = key
        self.size = size
        self._root = root
        self._episodes = episodes
        self._path: Path | None = None
        self._runs: Iterator[tuple[int, Any]] = iter(())
        self._told: set[str] = set()
        """Remarks that a warning has made."""

    def frames(self, episode: Episode, stride: int) -> Iterator[UInt8Image]:
        """Yield frames 0, stride, 2 * stride, ... of an episode, uint8 (H, W, 3).

        Raises:
            DatasetError: the data file cannot be read or has too few rows, or an image is missing, damaged or of
                a different size. The message names the file and the episode.
        """
        where = f"{episode.data_file}, episode {episode.index}"
        # A pass over a file serves all its episodes, so it starts only when the file changes.
        if self._path != episode.data_file:
            self._path = episode.data_file
            here = [other for other in self._episodes if other.data_file == self._path]
            self._runs = episode_runs(self._path, here, ["episode_index", self.key], _BATCH_ROWS)
        number = 0
        while number < episode.length:
            found = next(self._runs, None)
            if found is None:
                raise DatasetError(
                    f"{where}: {number} pictures of {self.key!r}, but the episode table gives length {episode.length}",
                    "the recording or the copy is incomplete",
                )
            index, run = found
            if index != episode.index:  # an episode that was not requested, in the same row group
                continue
            column = run.column(self.key)
            for i in range(run.num_rows):
                if number % stride == 0:
                    yield self._decode(column[i].as_py(), f"{where}, frame {number}")
                number += 1

    def close(self) -> None:
        self._path = None
        self._runs = iter(())

    def _decode(self, cell: object, where: str) -> UInt8Image:
        encoded = encoded_bytes(self._root, self.key, cell, where)
        try:
            decoded = decode_picture(encoded)
        except PictureKindError as error:
            raise DatasetError(
                f"{where}: the picture of {self.key!r} {error}",
                "name other cameras with --camera, or store the pictures as 8-bit RGB",
            ) from error
        except OSError as error:
            raise DatasetError(
                f"{where}: the picture of {self.key!r} cannot be decoded: {error}",
                "copy or download the dataset again",
            ) from error
        if decoded.remark is not None and decoded.remark not in self._told:
            self._told.add(decoded.remark)
            warn(f"{where}: the pictures of {self.key!r} {decoded.remark}")
        pixels = decoded.pixels
        if pixels.shape[:2] != self.size:
            raise DatasetError(
                f"{where}: the picture of {self.key!r} is {pixels.shape[0]}x{pixels.shape[1]} (height x width), "
                f"but meta/info.json declares {self.size[0]}x{self.size[1]}",
                "meta/info.json and the data files do not match",
            )
        return pixels


def encoded_bytes(root: Path, key: str, cell: object, where: str) -> bytes:
    """Return the encoded image of a cell: the bytes themselves, or {bytes, path} with one of the two.

    Args:
        root: the dataset's folder, to which `path` is relative.
        key: feature key, for messages.
        where: the data file and the frame, for messages.

    Raises:
        DatasetError: there is no image, or its file cannot be read.
    """
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(content, bytes):
        return content
    name = cell.get("path") if isinstance(cell, Mapping) else cell
    if name and isinstance(name, str):
        path = root / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise DatasetError(
                f"{where}: the picture file {path} cannot be read", "copy or download the dataset again"
            ) from error
    raise DatasetError(f"{where}: {key!r} has no picture", "copy or download the dataset again")

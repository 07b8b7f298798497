"""Parse `meta/info.json` of both LeRobot versions: version, frame rate, path templates and features.

No other file of the dataset is read. Unknown keys are ignored, as LeRobot does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imagewam_cli.errors import DatasetError

INFO_FILE = "meta/info.json"
SUPPORTED_VERSIONS = ("v2.1", "v3.0")

CAMERA_PREFIX = "observation.images."
_VISUAL_DTYPES = ("image", "video")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One entry of `features`: a column of the data files, or a camera."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Names of the axes (images) or of the dimensions (vectors); empty if the dataset has no names."""
    is_depth: bool

    @property
    def is_camera(self) -> bool:
        """Whether the feature holds color images. Depth maps do not count: their values are distances."""
        return self.dtype in _VISUAL_DTYPES and not self.is_depth

    @property
    def is_video(self) -> bool:
        return self.dtype == "video"

    @property
    def camera_name(self) -> str:
        """Name of the camera: "top" for `observation.images.top`, "image" for `observation.image`, else the key."""
        if self.key == "observation.image":
            return "image"
        return self.key.removeprefix(CAMERA_PREFIX)

    @property
    def size(self) -> int:
        """Number of values in a frame: 1 for a scalar, whose shape is []."""
        return math.prod(self.shape)

    def dimension_names(self) -> tuple[str, ...]:
        """Return one name per value, row by row, numbered from 0 if the dataset does not name every one."""
        if len(self.names) == self.size:
            return self.names
        axes = [size for size in self.shape if size > 1] or [1]
        return tuple("_".join([self.key, *map(str, position)]) for position in np.ndindex(*axes))

    def image_size(self) -> tuple[int, int]:
        """Return (height, width) of a camera.

        Old datasets store (3, H, W), so the names of the axes decide, and the sizes only if there are no names.

        Raises:
            DatasetError: the shape is not that of an image.
        """
        if len(self.shape) != 3:
            raise DatasetError(
                f"feature {self.key!r} has shape {list(self.shape)}, which is not an image",
                "expected (height, width, 3)",
            )
        named = len(self.names) == len(self.shape)
        axes = {name[:1].lower(): size for name, size in zip(self.names, self.shape, strict=True)} if named else {}
        if axes.keys() == {"h", "w", "c"}:
            return axes["h"], axes["w"]
        if self.shape[0] in (1, 3) and self.shape[2] not in (1, 3):
            return self.shape[1], self.shape[2]
        return self.shape[0], self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Info:
    """The part of `meta/info.json` that the reader needs."""

    root: Path
    version: str
    fps: float
    robot_type: str | None
    features: Mapping[str, Feature]
    """feature key -> feature, in the dataset's own order"""
    total_episodes: int
    total_frames: int
    chunks_size: int
    """v2.1: episodes per chunk folder; v3.0: files per chunk folder"""
    data_path: str
    """Template of the data files, relative to `root`."""
    video_path: str | None
    raw: Mapping[str, Any]
    """The whole file, for the dataset's identity."""

    @property
    def path(self) -> Path:
        return self.root / INFO_FILE

    def data_file(self, **indices: int) -> Path:
        """Return the data file for `episode_chunk`, `episode_index` (v2.1) or `chunk_index`, `file_index` (v3.0).

        Raises:
            DatasetError: the template has an unknown field.
        """
        return self.root / self._format("data_path", self.data_path, **indices)

    def video_file(self, video_key: str, **indices: int) -> Path:
        """Return the mp4 of one camera; `indices` are those of `data_file`.

        Raises:
            DatasetError: there is no template, or it has an unknown field.
        """
        if self.video_path is None:
            raise DatasetError(
                f"{self.path}: feature {video_key!r} is a video, but there is no 'video_path'",
                "restore the 'video_path' template in meta/info.json",
            )
        return self.root / self._format("video_path", self.video_path, video_key=video_key, **indices)

    def _format(self, name: str, template: str, **fields: str | int) -> str:
        try:
            return template.format(**fields)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DatasetError(
                f"{self.path}: cannot fill in {name!r} template {template!r}: {error!r}",
                f"version {self.version} templates use {', '.join(fields)}",
            ) from error


def load_info(root: Path) -> Info:
    """Parse `root/meta/info.json`.

    Raises:
        DatasetError: the file is not JSON, lacks a key, or its version is not one of `SUPPORTED_VERSIONS`.
    """
    path = root / INFO_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{root} has no {INFO_FILE}: it is not a LeRobot dataset", "pass the folder that contains meta/ and data/"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not valid JSON: {error}", "copy or download the dataset again") from error
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} holds no JSON object", "copy or download the dataset again")

    version = _read(path, raw, "codebase_version", str)
    if version not in SUPPORTED_VERSIONS:
        raise DatasetError(
            f"{path}: codebase_version {version!r} is not supported; supported: {', '.join(SUPPORTED_VERSIONS)}",
            "convert the dataset with LeRobot's own conversion scripts",
        )
    fps = float(_read(path, raw, "fps", int | float))
    if not fps > 0:
        raise DatasetError(f"{path}: fps is {fps}", "frames per second must be above 0")
    chunks_size = _read(path, raw, "chunks_size", int, 1000)
    if chunks_size < 1:
        raise DatasetError(f"{path}: chunks_size is {chunks_size}", "chunks_size must be at least 1")
    features = _read(path, raw, "features", dict)
    return Info(
        root=root,
        version=version,
        fps=fps,
        robot_type=_read(path, raw, "robot_type", str | None, None),
        features={key: _feature(path, key, entry) for key, entry in features.items()},
        total_episodes=_read(path, raw, "total_episodes", int),
        total_frames=_read(path, raw, "total_frames", int),
        chunks_size=chunks_size,
        data_path=_read(path, raw, "data_path", str),
        video_path=_read(path, raw, "video_path", str | None, None),
        raw=raw,
    )


_REQUIRED = object()


def _read(path: Path, raw: Mapping[str, Any], key: str, kind: Any, default: object = _REQUIRED) -> Any:
    value = raw.get(key, default)
    if value is _REQUIRED:
        raise DatasetError(f"{path} has no {key!r}", "every LeRobot dataset has this key; the file is incomplete")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(f"{path}: {key!r} is {value!r}", f"expected {getattr(kind, '__name__', kind)}")
    return value


def _feature(path: Path, key: str, entry: object) -> Feature:
    if not isinstance(entry, dict):
        raise DatasetError(f"{path}: feature {key!r} is {entry!r}", "expected an object with 'dtype' and 'shape'")
    shape = _read(path, entry, "shape", list)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise DatasetError(f"{path}: feature {key!r} has shape {shape}", "expected whole numbers")
    return Feature(
        key=key,
        dtype=_read(path, entry, "dtype", str),
        shape=tuple(shape),
        names=_flat_names(entry.get("names")),
        is_depth=_is_depth(entry),
    )


def _flat_names(names: object) -> tuple[str, ...]:
    """Flatten `names`: a list, a dictionary of lists ({"motors": [...]}), a dictionary name -> position, or null."""
    if isinstance(names, list):
        return tuple(str(name) for name in names)
    if isinstance(names, dict):
        if all(isinstance(position, int) for position in names.values()):
            return tuple(sorted(names, key=lambda name: int(names[name])))
        return tuple(str(name) for group in names.values() if isinstance(group, list) for name in group)
    return ()


def _is_depth(entry: Mapping[str, Any]) -> bool:
    # The flag moved twice: `video_info` before 0.2, "video.is_depth_map" before 0.6, "is_depth_map" since.
    for block in ("info", "video_info"):
        details = entry.get(block)
        if isinstance(details, dict) and (details.get("is_depth_map") or details.get("video.is_depth_map")):
            return True
    return False

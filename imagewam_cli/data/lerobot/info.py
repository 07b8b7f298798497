"""Parse `meta/info.json` of all LeRobot versions: version, frame rate, path templates and features.

No other file of the dataset is read. Unknown keys are ignored, as LeRobot does. What is written in an unusual way but
has only one meaning is read: whole numbers as floats or text, missing templates, a list of robots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imagewam_cli.data.lerobot.json_text import read_json
from imagewam_cli.data.lerobot.pixels import is_wide_gray
from imagewam_cli.errors import DatasetError, warn

INFO_FILE = "meta/info.json"
SUPPORTED_VERSIONS = ("v2.0", "v2.1", "v3.0")

Layout = Literal["v2", "v3"]
"""v2: one data file and one mp4 per camera for each episode; v3: many episodes in each file."""

_DEFAULT_PATHS: Mapping[Layout, tuple[str, str]] = {
    "v2": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
"""LeRobot's templates of data files and of videos."""

CAMERA_PREFIX = "observation.images."
_VISUAL_DTYPES = ("image", "video")
_DEPTH_DTYPE = "depth"


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
    def may_hold_depth(self) -> bool:
        """Whether it is a camera with one channel, which can be gray or, in datasets without a flag, depth."""
        if not self.is_camera:
            return False
        if len(self.shape) == 2:
            return True
        return len(self.shape) == 3 and 1 in (self.shape[0], self.shape[2])

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
        if len(self.shape) == 2:
            return self.shape[0], self.shape[1]
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
    """Version of the layout, in LeRobot's spelling: "v2.0", "v2.1" or "v3.0"."""
    fps: float
    robot_type: str | None
    features: Mapping[str, Feature]
    """feature key -> feature, in the dataset's own order"""
    total_episodes: int | None
    """Number of episodes that info.json declares. If it differs from the episode table, the table is read."""
    total_frames: int | None
    """Number of frames that info.json declares. If it differs from the episode table, the table is read."""
    chunks_size: int
    """v2: episodes per chunk folder; v3: files per chunk folder"""
    data_path: str
    """Template of the data files, relative to `root`."""
    video_path: str
    """Template of the mp4s, relative to `root`."""
    raw: Mapping[str, Any]
    """The whole file, for the dataset's identity."""

    @property
    def path(self) -> Path:
        return self.root / INFO_FILE

    @property
    def layout(self) -> Layout:
        return "v2" if self.version.startswith("v2") else "v3"

    def data_file(self, **indices: int) -> Path:
        """Return the data file for `episode_chunk`, `episode_index` (v2) or `chunk_index`, `file_index` (v3).

        Raises:
            DatasetError: the template has an unknown field.
        """
        return self.root / self._format("data_path", self.data_path, **indices)

    def video_file(self, video_key: str, **indices: int) -> Path:
        """Return the mp4 of one camera; `indices` are those of `data_file`.

        Raises:
            DatasetError: the template has an unknown field.
        """
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
        DatasetError: the file is not JSON, lacks a key, its version is not one of `SUPPORTED_VERSIONS`, or the files
            of the dataset are laid out as another version's.
    """
    path = root / INFO_FILE
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{root} has no {INFO_FILE}: it is not a LeRobot dataset", "pass the folder that contains meta/ and data/"
        ) from error
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} holds no JSON object", "copy or download the dataset again")

    version = _version(path, _read(path, raw, "codebase_version", str | int | float))
    layout: Layout = "v2" if version.startswith("v2") else "v3"
    _check_layout(root, version, layout)
    fps = _number(path, raw, "fps")
    if not 0 < fps < math.inf:
        raise DatasetError(f"{path}: fps is {fps}", "frames per second must be above 0")
    chunks_size = _count(path, raw, "chunks_size")
    if chunks_size is not None and chunks_size < 1:
        raise DatasetError(f"{path}: chunks_size is {chunks_size}", "chunks_size must be at least 1")
    features = _read(path, raw, "features", dict)
    data_path, video_path = _DEFAULT_PATHS[layout]
    return Info(
        root=root,
        version=version,
        fps=fps,
        robot_type=_robot_type(path, raw),
        features=_features(path, features),
        total_episodes=_count(path, raw, "total_episodes"),
        total_frames=_count(path, raw, "total_frames"),
        chunks_size=chunks_size or 1000,
        data_path=_read(path, raw, "data_path", str | None, None) or data_path,
        video_path=_read(path, raw, "video_path", str | None, None) or video_path,
        raw=raw,
    )


def _version(path: Path, declared: str | float) -> str:
    """Return a version as LeRobot spells it: "v3.0" for "v3.0", "3.0", "3" or the number 3.0."""
    parts = re.fullmatch(r"v?(\d+)(?:\.(\d+))?(?:\.\d+)*", str(declared).strip(), re.IGNORECASE)
    major, minor = (int(parts[1]), int(parts[2] or 0)) if parts else (0, 0)
    version = f"v{major}.{minor}"
    if version in SUPPORTED_VERSIONS:
        return version
    if major not in (2, 3):
        raise DatasetError(
            f"{path}: codebase_version {declared!r} is not supported; supported: {', '.join(SUPPORTED_VERSIONS)}",
            "convert the dataset with LeRobot's own conversion scripts",
        )
    known = max(name for name in SUPPORTED_VERSIONS if name.startswith(f"v{major}."))
    warn(f"{path}: codebase_version {declared!r} is newer than this reader; the dataset is read as {known}")
    return version


def _check_layout(root: Path, version: str, layout: Layout) -> None:
    """Refuse a dataset whose metadata files are those of the other layout, as half a conversion leaves them."""
    found: dict[Layout, str] = {}
    if (root / "meta/episodes.jsonl").exists():
        found["v2"] = "meta/episodes.jsonl"
    if any((root / "meta/episodes").glob("*/*.parquet")):
        found["v3"] = "meta/episodes/*/*.parquet"
    if found and layout not in found:
        ((other, files),) = found.items()
        raise DatasetError(
            f"{root / INFO_FILE} declares codebase_version {version}, but the dataset has {files}, which is the layout "
            f"of {other}",
            "download the dataset again at one revision, or convert it again with LeRobot's own conversion scripts",
        )


def _robot_type(path: Path, raw: Mapping[str, Any]) -> str | None:
    declared = _read(path, raw, "robot_type", str | list | None, None)
    return ", ".join(str(robot) for robot in declared) if isinstance(declared, list) else declared


def _features(path: Path, entries: Mapping[str, Any]) -> dict[str, Feature]:
    empty = [key for key, entry in entries.items() if entry is None]
    if empty:
        warn(f"{path}: feature {', '.join(map(repr, empty))} is null and therefore ignored")
    return {key: _feature(path, key, entry) for key, entry in entries.items() if entry is not None}


_REQUIRED = object()


def _read(path: Path, raw: Mapping[str, Any], key: str, kind: Any, default: object = _REQUIRED) -> Any:
    value = raw.get(key, default)
    if value is _REQUIRED:
        raise DatasetError(f"{path} has no {key!r}", "every LeRobot dataset has this key; the file is incomplete")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(f"{path}: {key!r} is {value!r}", f"expected {getattr(kind, '__name__', kind)}")
    return value


def _number(path: Path, raw: Mapping[str, Any], key: str) -> float:
    """Return a number, which may be written as text ("10")."""
    value = _read(path, raw, key, int | float | str)
    try:
        return float(value)
    except ValueError as error:
        raise DatasetError(f"{path}: {key!r} is {value!r}", "expected a number") from error


def _count(path: Path, raw: Mapping[str, Any], key: str) -> int | None:
    """Return a whole number, which may be written as a float (3.0) or text ("3"); None if it is missing or null."""
    if raw.get(key) is None:
        return None
    number = _number(path, raw, key)
    if not number.is_integer():
        raise DatasetError(f"{path}: {key!r} is {raw[key]!r}", "expected a whole number")
    return int(number)


def _feature(path: Path, key: str, entry: object) -> Feature:
    if not isinstance(entry, dict):
        raise DatasetError(f"{path}: feature {key!r} is {entry!r}", "expected an object with 'dtype' and 'shape'")
    shape = _read(path, entry, "shape", list)
    if not all(isinstance(size, int | float) and size >= 0 and float(size).is_integer() for size in shape):
        raise DatasetError(f"{path}: feature {key!r} has shape {shape}", "expected whole numbers")
    return Feature(
        key=key,
        dtype=_read(path, entry, "dtype", str),
        shape=tuple(int(size) for size in shape),
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
    if entry.get("dtype") == _DEPTH_DTYPE or entry.get("is_depth_map"):
        return True
    # The flag moved twice: `video_info` before 0.2, "video.is_depth_map" before 0.6, "is_depth_map" since.
    for block in ("info", "video_info"):
        details = entry.get(block)
        if isinstance(details, dict):
            pix_fmt = details.get("video.pix_fmt")
            if details.get("is_depth_map") or details.get("video.is_depth_map"):
                return True
            if isinstance(pix_fmt, str) and is_wide_gray(pix_fmt):
                return True
    return False

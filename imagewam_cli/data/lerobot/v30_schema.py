"""Define the v3.0 layout for the writer: features of info.json, arrow schemas, file numbering.

All names and types are those of lerobot 0.6.1, whose reader looks columns up by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from imagewam_cli.data.lerobot.info import CAMERA_PREFIX

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

STATE_KEY = "observation.state"
ACTION_KEY = "action"
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every LeRobot dataset has, with their dtype; all of shape (1,)."""

STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, kw_only=True)
class FilePosition:
    """Number of a data, video or episodes file, and of its chunk folder."""

    chunk_index: int = 0
    file_index: int = 0

    def next(self, chunks_size: int) -> FilePosition:
        if self.file_index + 1 < chunks_size:
            return FilePosition(chunk_index=self.chunk_index, file_index=self.file_index + 1)
        return FilePosition(chunk_index=self.chunk_index + 1)

    def format(self, template: str, **fields: str) -> str:
        return template.format(chunk_index=self.chunk_index, file_index=self.file_index, **fields)


def camera_key(camera: str) -> str:
    return CAMERA_PREFIX + camera


def info_features(
    cameras: Mapping[str, tuple[int, int]],
    state_names: Sequence[str],
    action_names: Sequence[str],
    video: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return `features` of info.json. video: the encoder's entries, or None if images are in the data files."""
    features: dict[str, Any] = {}
    for camera, (height, width) in cameras.items():
        entry: dict[str, Any] = {
            "dtype": "image" if video is None else "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if video is not None:
            entry["info"] = {"video.height": height, "video.width": width, **video}
        features[camera_key(camera)] = entry
    features[STATE_KEY] = {"dtype": "float32", "shape": [len(state_names)], "names": list(state_names)}
    features[ACTION_KEY] = {"dtype": "float32", "shape": [len(action_names)], "names": list(action_names)}
    for key, dtype in BOOKKEEPING.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def data_schema(features: Mapping[str, Any]) -> Any:
    """Return the arrow schema of the data files.

    Videos have no column, features of shape (1,) are scalars, and vectors are fixed-size lists. The "huggingface" entry
    of its metadata declares the same types for the `datasets` library, as its own `Features` would.
    """
    fields = []
    declared: dict[str, Any] = {}
    for key, feature in features.items():
        kind, size = feature["dtype"], feature["shape"]
        if kind == "video":
            continue
        if kind == "image":
            fields.append(pa.field(key, _PICTURE))
            declared[key] = {"_type": "Image"}
        elif size == [1]:
            fields.append(pa.field(key, getattr(pa, kind)()))
            declared[key] = {"dtype": kind, "_type": "Value"}
        else:
            fields.append(pa.field(key, pa.list_(pa.field("element", getattr(pa, kind)()), size[0])))
            declared[key] = {"feature": {"dtype": kind, "_type": "Value"}, "length": size[0], "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": declared}})})


def episodes_schema(features: Mapping[str, Any]) -> Any:
    """Return the arrow schema of `meta/episodes`: one row per episode, with the statistics of each feature."""
    int64, float64 = pa.int64(), pa.float64()
    fields = [("episode_index", int64), ("tasks", _list(pa.string())), ("length", int64)]
    fields += [(name, int64) for name in ("data/chunk_index", "data/file_index")]
    fields += [(name, int64) for name in ("dataset_from_index", "dataset_to_index")]
    for key, feature in features.items():
        if feature["dtype"] == "video":
            fields += [(f"videos/{key}/{name}", int64) for name in ("chunk_index", "file_index")]
            fields += [(f"videos/{key}/{name}", float64) for name in ("from_timestamp", "to_timestamp")]
    for key, feature in features.items():
        numbers = _list(_list(_list(float64))) if feature["dtype"] in ("image", "video") else _list(float64)
        fields += [(f"stats/{key}/{name}", _list(int64) if name == "count" else numbers) for name in STATISTICS]
    fields += [(name, int64) for name in ("meta/episodes/chunk_index", "meta/episodes/file_index")]
    return pa.schema(fields)


def tasks_table(tasks: Sequence[str]) -> Any:
    """Return the table of `meta/tasks.parquet`: columns `task_index` and `task`, which is the index for pandas.

    lerobot reads this file with pandas and looks instructions up in the index. The metadata are what
    `DataFrame.to_parquet` would have stored; building them here avoids a dependency on pandas.
    """
    description = {
        "index_columns": ["task"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {
                "name": "task",
                "field_name": "task",
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": None,
            },
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(description)}
    )
    return pa.table([list(range(len(tasks))), list(tasks)], schema=schema)


def _list(kind: Any) -> Any:
    return pa.list_(pa.field("element", kind))

"""Write small LeRobot v2.1 datasets with features of any name, type and shape, as other tools name them.

Pictures are PNG images inside the data files. Numbers of row r, dimension d are `value(key, r, d)`, so that a test
knows what a reader must return.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (6, 9, 7)
_MESSAGE = pa.struct([("style", pa.string()), ("content", pa.string()), ("timestamp", pa.float32())])
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Column:
    """One feature. values: one per row; None: `value` of each dimension."""

    dtype: str = "float32"
    shape: Sequence[int] = (1,)
    names: Any = None
    values: Sequence[Any] | None = None


def value(key: str, row: int, dimension: int) -> float:
    """Return the number of a feature at a row and dimension: different for each, and exact in float32."""
    return zlib.crc32(key.encode()) % 97 + row / 4 + 100.0 * dimension


def vectors(key: str, shape: Sequence[int], rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the numbers of a feature, float32 (rows, size)."""
    size = int(np.prod(shape))
    return np.array([[value(key, row, d) for d in range(size)] for row in range(rows)], np.float32)


def write_features(
    root: Path,
    columns: Mapping[str, Column],
    *,
    cameras: Mapping[str, tuple[int, int]] | None = None,
    lengths: Sequence[int] = LENGTHS,
    tasks: Sequence[str] = ("push the red cube",),
    undeclared: Collection[str] = (),
) -> Path:
    """Write a dataset. cameras: feature key -> (height, width); default: one. undeclared: not in info.json."""
    cameras = {"observation.images.top": (32, 32)} if cameras is None else cameras
    total = sum(lengths)
    data = {key: _values(key, column, total) for key, column in columns.items()}
    kinds = {key: _kind(column) for key, column in columns.items()}
    starts = np.cumsum([0, *lengths]).tolist()
    rng = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        span = range(starts[episode], starts[episode + 1])
        table: dict[str, Any] = {key: pa.array([data[key][r] for r in span], kinds[key]) for key in columns}
        table |= {
            "timestamp": pa.array([frame / FPS for frame in range(length)], pa.float32()),
            "frame_index": pa.array(range(length), pa.int64()),
            "episode_index": pa.array([episode] * length, pa.int64()),
            "index": pa.array(span, pa.int64()),
            "task_index": pa.array([episode % len(tasks)] * length, pa.int64()),
        }
        for key, size in cameras.items():
            pictures = rng.integers(0, 256, (length, *size, 3), dtype=np.uint8)
            table[key] = pa.array([{"bytes": _png(pixels), "path": None} for pixels in pictures], _PICTURE)
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    declared = {key: column for key, column in columns.items() if key not in undeclared}
    _write_metadata(root, declared, cameras, lengths, tasks)
    return root


def _write_metadata(
    root: Path,
    columns: Mapping[str, Column],
    cameras: Mapping[str, tuple[int, int]],
    lengths: Sequence[int],
    tasks: Sequence[str],
) -> None:
    features: dict[str, Any] = {
        key: {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for key, size in cameras.items()
    }
    for key, column in columns.items():
        features[key] = {"dtype": column.dtype, "shape": list(column.shape), "names": column.names}
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "testbot",
        "fps": FPS,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    meta = root / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / "info.json").write_text(json.dumps(info))
    _write_lines(meta / "tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    episodes = [{"episode_index": i, "length": n, "tasks": [tasks[i % len(tasks)]]} for i, n in enumerate(lengths)]
    _write_lines(meta / "episodes.jsonl", episodes)


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _values(key: str, column: Column, rows: int) -> Sequence[Any]:
    if column.values is not None:
        return column.values
    numbers = vectors(key, column.shape, rows).reshape(rows, *column.shape)
    return numbers.tolist()  # type: ignore[no-any-return]


def _kind(column: Column) -> Any:
    """Return the arrow type: scalars for shapes [] and [1], else lists, nested once per axis."""
    if column.dtype == "language":
        return pa.list_(_MESSAGE)
    kind = {"string": pa.string()}.get(column.dtype) or getattr(pa, column.dtype)()
    if column.values is not None:
        return kind if len(column.shape) < 2 else pa.list_(kind)
    for _ in column.shape:
        kind = pa.list_(kind)
    return kind


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()

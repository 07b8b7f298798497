"""Record episodes as a LeRobot v3.0 dataset that lerobot 0.6.1 can open.

Everything is written into a hidden folder next to the target, which is renamed when it is complete. An error, a full
disk or Ctrl-C never leaves an incomplete dataset that looks complete.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imagewam_cli.data.lerobot import v30_schema
from imagewam_cli.data.lerobot.encoder import CameraEncoder, VideoCodec, encoder_settings
from imagewam_cli.data.lerobot.statistics import DatasetStatistics, PictureHistogram, Statistics
from imagewam_cli.data.types import Float32Array, UInt8Image
from imagewam_cli.errors import DatasetError, UsageError
from imagewam_cli.files import atomic_folder, expanded, local_name, require_vacant

_MEGABYTE = 1024**2
_EPISODES_PER_ROW_GROUP = 100


class LeRobotWriter:
    """Write one dataset, episode by episode, inside a `with` block.

        with LeRobotWriter(root, fps=10, robot_type="arm", cameras={"top": (128, 128)},
                           state_names=["x", "y"], action_names=["dx", "dy"]) as writer:
            writer.add_episode(frames={"top": frames}, states=states, actions=actions, instruction="push the cube")

    Leaving the block completes the dataset; an exception deletes everything written. Memory holds one episode and the
    statistics, whose size does not depend on the number of episodes.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: int,
        robot_type: str | None,
        cameras: Mapping[str, tuple[int, int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        video_codec: VideoCodec | None = "h264",
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
        chunks_size: int = 1000,
    ) -> None:
        """
        Args:
            root: folder of the new dataset; it must be missing or empty.
            fps: frames per second of the recording, a whole number.
            robot_type: name of the robot in info.json.
            cameras: camera name -> (height, width) of its frames; names become `observation.images.<name>`.
            state_names: one name per dimension of the state.
            action_names: one name per dimension of the action.
            video_codec: "h264" (fast to encode), "av1" (small), or None: PNG pictures inside the data files (exact).
            data_files_size_in_mb: maximum size of a data file; the next episode then starts a new one.
            video_files_size_in_mb: the same for mp4 files.
            chunks_size: files per chunk folder.

        Raises:
            UsageError: an argument is wrong, or the folder exists and is not empty.
        """
        self.root = expanded(root)
        require_vacant(self.root)
        if isinstance(fps, bool) or not isinstance(fps, int) or fps < 1:
            raise UsageError(f"fps is {fps!r}", "LeRobot v3.0 stores a whole number of frames per second, at least 1")
        for kind, names in (("state", state_names), ("action", action_names)):
            if not names or len(set(names)) != len(names):
                raise UsageError(f"{kind}_names are {list(names)}", "pass at least one name, and no name twice")
        for camera, (height, width) in cameras.items():
            _check_camera(camera, height, width, encoded=video_codec is not None)

        self._fps = fps
        self._robot_type = robot_type
        self._cameras = dict(cameras)
        self._dims = {"states": len(state_names), "actions": len(action_names)}
        self._settings = encoder_settings(video_codec) if video_codec is not None else None
        self._data_mb = data_files_size_in_mb
        self._video_mb = video_files_size_in_mb
        self._chunks_size = chunks_size
        self._features = v30_schema.info_features(
            self._cameras, state_names, action_names, self._settings.info(fps) if self._settings else None
        )
        self._data_schema = v30_schema.data_schema(self._features)
        self._episodes_schema = v30_schema.episodes_schema(self._features)

        self._stack = ExitStack()
        self._temporary: Path | None = None
        self._half_written = False
        self._encoders: list[CameraEncoder] = []
        self._data: _RollingParquet | None = None
        self._episode_table: _RollingParquet | None = None
        self._pending: list[dict[str, Any]] = []
        self._statistics = DatasetStatistics()
        self._tasks: dict[str, int] = {}
        self._episodes = 0
        self._rows = 0

    def __enter__(self) -> LeRobotWriter:
        if self._temporary is not None:
            raise UsageError("the writer is already open", "use a new LeRobotWriter for another dataset")
        temporary = self._stack.enter_context(atomic_folder(self.root))
        self._stack.push(self._end)  # before the folder is renamed or deleted
        self._temporary = temporary
        if self._settings is not None:
            self._encoders = [
                CameraEncoder(
                    temporary,
                    v30_schema.camera_key(camera),
                    self._settings,
                    fps=self._fps,
                    size=size,
                    file_size_mb=self._video_mb,
                    chunks_size=self._chunks_size,
                )
                for camera, size in self._cameras.items()
            ]
        self._data = _RollingParquet(
            temporary, v30_schema.DATA_PATH, self._data_schema, self._data_mb, self._chunks_size
        )
        self._episode_table = _RollingParquet(
            temporary, v30_schema.EPISODES_PATH, self._episodes_schema, self._data_mb, self._chunks_size
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Complete the files after a block without an error, and close them in any case."""
        try:
            if kind is None:
                self._complete()
        finally:
            self._close()

    def add_episode(
        self,
        *,
        frames: Mapping[str, Sequence[UInt8Image] | UInt8Image],
        states: npt.ArrayLike,
        actions: npt.ArrayLike,
        instruction: str,
    ) -> int:
        """Record one episode of L >= 1 steps and return its index.

        Args:
            frames: camera -> L pictures, uint8 (H, W, 3) RGB (a list, or one array (L, H, W, 3)); every camera.
            states: (L, S) in robot units; row i is the state observed at step i.
            actions: (L, A) in robot units; row i is the command at step i.
            instruction: the task in plain English.

        Raises:
            UsageError: shapes, types or cameras do not match the dataset, a number is not finite, or the writer is
                not open. No part of the episode was written.
            DatasetError: the video encoder failed.
        """
        if self._data is None or self._episode_table is None:
            raise UsageError("the writer is not open", "use it in a with block: with LeRobotWriter(...) as writer:")
        index = self._episodes
        state = _vectors("states", states, self._dims["states"], index)
        action = _vectors("actions", actions, self._dims["actions"], index)
        length = len(state)
        if len(action) != length:
            raise UsageError(
                f"episode {index} has {length} states and {len(action)} actions",
                "pass one state and one action per step",
            )
        if not instruction.strip():
            raise UsageError(f"episode {index} has no instruction", "describe in plain English what the robot does")
        pictures = self._pictures(frames, length, index)

        self._half_written = True  # remains True after an error, because the files then disagree about this episode
        task_index = self._tasks.setdefault(instruction, len(self._tasks))
        columns = self._columns(state, action, task_index)
        statistics = self._statistics.add(columns, {key: _histogram(images) for key, images in pictures.items()})
        position = self._data.write(self._data_table(columns, pictures), length)
        self._pending.append(
            {
                "episode_index": index,
                "tasks": [instruction],
                "length": length,
                "data/chunk_index": position.chunk_index,
                "data/file_index": position.file_index,
                "dataset_from_index": self._rows,
                "dataset_to_index": self._rows + length,
                **self._encode(pictures, length),
                **_flat(statistics),
            }
        )
        self._episodes += 1
        self._rows += length
        if len(self._pending) >= _EPISODES_PER_ROW_GROUP:
            self._flush_episodes()
        self._half_written = False
        return index

    def _pictures(
        self, frames: Mapping[str, Sequence[UInt8Image] | UInt8Image], length: int, index: int
    ) -> dict[str, list[UInt8Image]]:
        """Check the frames of every camera and return them by feature key."""
        if frames.keys() != self._cameras.keys():
            raise UsageError(
                f"episode {index} has cameras {sorted(frames)}, but the dataset has {sorted(self._cameras)}",
                "pass the frames of every camera",
            )
        pictures = {}
        for camera, (height, width) in self._cameras.items():
            shown = [np.asarray(picture) for picture in frames[camera]]
            if len(shown) != length:
                raise UsageError(
                    f"episode {index} has {length} states and {len(shown)} frames of camera {camera!r}",
                    "pass one frame per step",
                )
            for number, picture in enumerate(shown):
                if picture.shape != (height, width, 3) or picture.dtype != np.uint8:
                    raise UsageError(
                        f"episode {index}, camera {camera!r}, frame {number} is {picture.dtype} {picture.shape}, "
                        f"expected uint8 {(height, width, 3)}",
                        "convert the frames to uint8 RGB of the declared (height, width)",
                    )
            pictures[v30_schema.camera_key(camera)] = shown
        return pictures

    def _columns(self, state: Float32Array, action: Float32Array, task_index: int) -> dict[str, npt.NDArray[Any]]:
        """Return the episode's numbers, (L, D) each, by feature key."""
        length = len(state)
        frame_index = np.arange(length, dtype=np.int64)[:, None]
        return {
            v30_schema.STATE_KEY: state,
            v30_schema.ACTION_KEY: action,
            "timestamp": (frame_index / self._fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full_like(frame_index, self._episodes),
            "index": frame_index + self._rows,
            "task_index": np.full_like(frame_index, task_index),
        }

    def _data_table(self, columns: Mapping[str, npt.NDArray[Any]], pictures: Mapping[str, Sequence[UInt8Image]]) -> Any:
        """Return the episode as a table of the data files, in which videos have no column."""
        arrays = []
        for field in self._data_schema:
            if field.name in pictures:
                cells = [
                    {"bytes": _png(picture), "path": f"frame-{number:06d}.png"}
                    for number, picture in enumerate(pictures[field.name])
                ]
                arrays.append(pa.array(cells, type=field.type))
            elif pa.types.is_fixed_size_list(field.type):
                flat = pa.array(columns[field.name].ravel(), type=field.type.value_type)
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(pa.array(columns[field.name][:, 0], type=field.type))
        return pa.Table.from_arrays(arrays, schema=self._data_schema)

    def _encode(self, pictures: Mapping[str, Sequence[UInt8Image]], length: int) -> dict[str, float]:
        """Encode the episode's videos and return its `videos/...` columns."""
        line: dict[str, float] = {}
        for encoder in self._encoders:
            start = encoder.add(pictures[encoder.key])
            prefix = f"videos/{encoder.key}"
            line[f"{prefix}/chunk_index"] = start.position.chunk_index
            line[f"{prefix}/file_index"] = start.position.file_index
            # Divide whole frames: sums of durations in floating point would drift over many episodes.
            line[f"{prefix}/from_timestamp"] = start.first_frame / self._fps
            line[f"{prefix}/to_timestamp"] = (start.first_frame + length) / self._fps
        return line

    def _flush_episodes(self) -> None:
        if not self._pending or self._episode_table is None:
            return
        position = self._episode_table.next_position(len(self._pending))
        for line in self._pending:
            line["meta/episodes/chunk_index"] = position.chunk_index
            line["meta/episodes/file_index"] = position.file_index
        table = pa.Table.from_pylist(self._pending, schema=self._episodes_schema)
        self._episode_table.write(table, len(self._pending))
        self._pending = []

    def _complete(self) -> None:
        if self._temporary is None or self._data is None or self._episode_table is None:
            raise UsageError("the writer is not open", "use it in a with block")
        if self._episodes == 0:
            raise UsageError(f"no episode was added to {self.root}", "record at least one episode")
        if self._half_written:
            raise DatasetError(
                f"episode {self._episodes} of {self.root} was not written completely; the dataset was deleted",
                "do not catch errors of add_episode inside the with block",
            )
        for encoder in self._encoders:
            encoder.close()
        self._flush_episodes()
        self._data.close()
        self._episode_table.close()
        meta = self._temporary / "meta"
        pq.write_table(
            v30_schema.tasks_table(list(self._tasks)), local_name(meta / "tasks.parquet"), compression="snappy"
        )
        _write_json(meta / "stats.json", self._statistics.result())
        _write_json(meta / "info.json", self._info())

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "fps": self._fps,
            "features": self._features,
            "total_episodes": self._episodes,
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": self._chunks_size,
            "data_files_size_in_mb": self._data_mb,
            "video_files_size_in_mb": self._video_mb,
            "data_path": v30_schema.DATA_PATH,
            "video_path": v30_schema.VIDEO_PATH if self._encoders else None,
            "robot_type": self._robot_type,
            "splits": {"train": f"0:{self._episodes}"},
        }

    def _close(self) -> None:
        try:
            for encoder in self._encoders:
                encoder.abandon()
            for file in (self._data, self._episode_table):
                if file is not None:
                    file.close()
        finally:
            self._data = self._episode_table = None


class _RollingParquet:
    """Append tables, one row group each, to numbered parquet files of limited size."""

    def __init__(self, root: Path, template: str, schema: Any, file_size_mb: float, chunks_size: int) -> None:
        self._root = root
        self._template = template
        self._schema = schema
        self._file_size_mb = file_size_mb
        self._chunks_size = chunks_size
        self._position = v30_schema.FilePosition()
        self._writer: Any = None
        self._items = 0

    def next_position(self, items: int) -> v30_schema.FilePosition:
        """Return the file for a table of `items` frames or episodes: the current one, or a new one if that is full."""
        if self._items:
            size_mb = self._path().stat().st_size / _MEGABYTE
            if size_mb + size_mb / self._items * items >= self._file_size_mb:
                self.close()
                self._position = self._position.next(self._chunks_size)
        return self._position

    def write(self, table: Any, items: int) -> v30_schema.FilePosition:
        """Append `table` and return its file."""
        position = self.next_position(items)
        if self._writer is None:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                local_name(path),
                self._schema,
                compression="snappy",
                write_statistics=_columns_with_statistics(self._schema),
            )
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._items += items
        return position

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._items = None, 0

    def _path(self) -> Path:
        return self._root / self._position.format(self._template)


def _columns_with_statistics(schema: Any) -> bool | list[str]:
    """Return the columns that store their minimum and maximum: all but images, which would be stored whole."""
    plain = [field.name for field in schema if not pa.types.is_struct(field.type)]
    return plain if len(plain) < len(schema) else True


def _check_camera(camera: str, height: int, width: int, *, encoded: bool) -> None:
    # The name becomes part of a column name, whose parts are divided by "/", and of a folder name.
    if not camera or "/" in camera or "\\" in camera:
        raise UsageError(f"camera name {camera!r} cannot be a feature name", "use letters, digits, '_', '-' and '.'")
    if height < 1 or width < 1 or (encoded and (height % 2 or width % 2)):
        raise UsageError(
            f"camera {camera!r} is {height}x{width} (height x width), which cannot be encoded",
            "use even numbers of pixels (chroma is stored for 2x2 pixels), or video_codec=None",
        )


def _vectors(name: str, values: npt.ArrayLike, dim: int, episode: int) -> Float32Array:
    vectors = np.asarray(values, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != dim:
        raise UsageError(
            f"episode {episode}: {name} have shape {vectors.shape}, expected (L, {dim}) with L >= 1",
            f"pass one row of {dim} numbers per step",
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UsageError(f"episode {episode}: {name} are not finite at step {bad[0]}", "omit that episode")
    return vectors


def _histogram(pictures: Sequence[UInt8Image]) -> PictureHistogram:
    histogram = PictureHistogram()
    for picture in pictures:
        histogram.add(picture)
    return histogram


def _png(picture: UInt8Image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _flat(statistics: Mapping[str, Statistics]) -> dict[str, list[Any]]:
    return {f"stats/{key}/{name}": values for key, fields in statistics.items() for name, values in fields.items()}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")

"""Read and check the states, actions and task numbers of a data file, one episode at a time.

A v3.0 file may have one row group per episode, or a single one for thousands of episodes. Row groups therefore only
help to skip. Rows are streamed in batches and split where `episode_index` changes, so memory holds one episode.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imagewam_cli.data.lerobot.info import Feature, Info
from imagewam_cli.data.lerobot.keys import Selection
from imagewam_cli.data.lerobot.messages import active_messages
from imagewam_cli.data.lerobot.metadata import Episode, unreadable_parquet
from imagewam_cli.data.precision import compact
from imagewam_cli.data.types import FloatArray, KeyMap
from imagewam_cli.errors import DatasetError
from imagewam_cli.files import local_name

_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class EpisodeTable:
    """The numbers of one episode of L rows."""

    state: FloatArray
    """(L, S) in robot units"""
    action: FloatArray
    """(L, A) in robot units"""
    timestamps: npt.NDArray[np.float64]
    """(L,) seconds from the episode's start"""
    instruction: npt.NDArray[np.int64] | Sequence[object]
    """(L,) the instruction of each frame: a text (None if it is missing), or the number of a task"""


def with_undeclared(info: Info, keys: KeyMap, data_file: Path) -> Info:
    """Return `info` with the columns that only the data files have, if `keys` name a feature that it lacks."""
    named = [*keys.state.split(","), *keys.action.split(","), *([keys.instruction] if keys.instruction else [])]
    if all(key.strip() in info.features for key in named):
        return info
    return replace(info, features={**info.features, **undeclared_features(data_file, info.features)})


def undeclared_features(path: Path, declared: Collection[str]) -> dict[str, Feature]:
    """Return the columns of a data file that meta/info.json does not declare, with the shapes of its first row.

    Returns nothing if the file cannot be read.
    """
    try:
        file = pq.ParquetFile(local_name(path), pre_buffer=False)
        columns = [name for name in file.schema_arrow.names if name not in declared]
        row = next(file.iter_batches(batch_size=1, columns=columns), None) if columns else None
    except (OSError, pa.ArrowException):
        return {}
    found = {} if row is None else {name: _feature_of(name, row.column(name)) for name in columns}
    return {name: feature for name, feature in found.items() if feature is not None}


def _feature_of(key: str, column: Any) -> Feature | None:
    """Return the feature of a column of one row; None if it holds neither numbers nor texts, or is empty."""
    shape = []
    while _is_list(column.type) and len(column) and column[0].is_valid:
        shape.append(len(column[0]))
        column = column[0].values
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        dtype = "string"
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        dtype = np.dtype(kind.to_pandas_dtype()).name
    else:
        return None
    return Feature(key=key, dtype=dtype, shape=tuple(shape), names=(), is_depth=False)


def read_episode_tables(path: Path, episodes: Sequence[Episode], selection: Selection) -> Iterator[EpisodeTable]:
    """Yield the tables of `episodes`, all stored in `path` and ascending by index, in one pass over the file.

    Raises:
        DatasetError: the file is missing, truncated or lacks a column; an episode's number of rows is not its length;
            a vector has the wrong size; a value is missing, NaN or infinite; frames are not consecutive.
    """
    columns = ["episode_index", "frame_index", "timestamp", _instruction_key(selection)]
    columns += [feature.key for feature in (*selection.state, *selection.action)]
    for episode, rows in _whole_episodes(path, episodes, list(dict.fromkeys(columns))):
        yield _check_rows(path, episode, rows, selection)


def _instruction_key(selection: Selection) -> str:
    return "task_index" if selection.instruction is None else selection.instruction.key


def _whole_episodes(path: Path, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[tuple[Episode, Any]]:
    """Yield each of `episodes` with its rows as one arrow table; the file must hold them in the same order."""
    waiting = list(episodes)
    parts: list[Any] = []
    for index, part in episode_runs(path, episodes, columns, _BATCH_ROWS):
        if parts and index != waiting[0].index:
            yield waiting.pop(0), pa.Table.from_batches(parts)
            parts = []
        if waiting and index == waiting[0].index:
            parts.append(part)
        elif any(index == episode.index for episode in waiting):
            raise DatasetError(
                f"{path} has rows of episode {index} where those of episode {waiting[0].index} should be",
                "the dataset was merged or edited incorrectly; redo the merge or the edit",
            )
    if parts:
        yield waiting.pop(0), pa.Table.from_batches(parts)
    if waiting:
        raise DatasetError(
            f"{path} has no rows of episode {waiting[0].index}",
            "the file is truncated or belongs to a different dataset",
        )


def episode_runs(
    path: Path, episodes: Sequence[Episode], columns: Sequence[str], batch_rows: int
) -> Iterator[tuple[int, Any]]:
    """Yield (episode_index, record batch of its consecutive rows) through the file.

    An episode longer than `batch_rows` comes in several runs. Row groups without any of `episodes` are skipped, but
    rows of other episodes may come. `columns` must include `episode_index`; at most `batch_rows` rows are in memory.

    Raises:
        DatasetError: the file is missing, truncated or lacks a column.
    """
    with _reading(path, episodes):
        # No read-ahead: it would load whole row groups, which can be many gigabytes of images.
        file = pq.ParquetFile(local_name(path), pre_buffer=False)
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise DatasetError(
                f"{path} (episode {episodes[0].index}) has no column {missing[0]!r}",
                "meta/info.json and the data files do not match",
            )
        wanted = sorted(episode.index for episode in episodes)
        groups = [i for i in range(file.metadata.num_row_groups) if _may_hold(file.metadata.row_group(i), wanted)]
        batches = file.iter_batches(batch_size=batch_rows, row_groups=groups, columns=list(columns))
    while True:
        with _reading(path, episodes):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.num_rows == 0:
            continue
        index = flat_index(batch.column("episode_index")).to_numpy(zero_copy_only=False)
        starts = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for start, stop in itertools.pairwise(starts):
            yield int(index[start]), batch.slice(start, stop - start)


def picture_paths(path: Path, episodes: Sequence[Episode], key: str) -> Iterator[str]:
    """Yield the paths of picture files that the image column `key` names for the rows of `episodes`.

    Reads no picture. A row group whose pictures are all inside the file, as its statistics say, is skipped.

    Raises:
        DatasetError: the file is missing or truncated.
    """
    with _reading(path, episodes):
        file = pq.ParquetFile(local_name(path), pre_buffer=False)
        wanted = sorted(episode.index for episode in episodes)
        groups = [
            i
            for i in range(file.metadata.num_row_groups)
            if _may_hold(file.metadata.row_group(i), wanted) and _may_lack(file.metadata.row_group(i), f"{key}.bytes")
        ]
        table = file.read_row_groups(groups, columns=["episode_index", f"{key}.path"])
        if key not in table.column_names or not pa.types.is_struct(table.schema.field(key).type):
            return
        rows = table.filter(pc.is_in(table.column("episode_index"), pa.array(wanted)))
        paths = pc.struct_field(rows.column(key), "path")
    yield from (str(found) for found in pc.unique(paths).to_pylist() if found)


@contextmanager
def _reading(path: Path, episodes: Sequence[Episode]) -> Iterator[None]:
    """Turn pyarrow's errors into a `DatasetError` that names the file and its episodes."""
    first, last = episodes[0].index, episodes[-1].index
    span = f"episode {first}" if first == last else f"episodes {first}..{last}"
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path} ({span}) is missing", "copy or download the dataset again") from error
    except (pa.ArrowException, OSError) as error:
        raise unreadable_parquet(path, f"{path} ({span})", error) from error


def _may_hold(group: Any, wanted: Sequence[int]) -> bool:
    """Return whether a row group may have rows of `wanted` (ascending); without statistics, any may."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == "episode_index":
            statistics = column.statistics
            if statistics is None or not statistics.has_min_max:
                return True
            return bisect_left(wanted, statistics.min) < bisect_right(wanted, statistics.max)
    return True


def _may_lack(group: Any, leaf: str) -> bool:
    """Return whether a row group may have rows without a value in the column `leaf`; without statistics, any may."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == leaf:
            statistics = column.statistics
            return statistics is None or not statistics.has_null_count or statistics.null_count > 0
    return True


@dataclass(frozen=True)
class _Place:
    """File and episode, to name in errors."""

    path: Path
    episode: int

    def __str__(self) -> str:
        return f"{self.path}, episode {self.episode}"

    @property
    def hint(self) -> str:
        return f"repair the episode, or leave it out: --exclude-episodes {self.episode}"


def _check_rows(path: Path, episode: Episode, rows: Any, selection: Selection) -> EpisodeTable:
    where = _Place(path, episode.index)
    if rows.num_rows != episode.length:
        raise DatasetError(
            f"{where} has {rows.num_rows} rows, but the episode table gives length {episode.length}",
            where.hint,
        )
    frames = _scalars(rows, "frame_index", where, np.int64)
    if not np.array_equal(frames, np.arange(episode.length)):
        raise DatasetError(f"{where}: frame_index is not 0 .. {episode.length - 1}", where.hint)
    return EpisodeTable(
        state=_concatenated(rows, selection.state, where),
        action=_concatenated(rows, selection.action, where),
        timestamps=_scalars(rows, "timestamp", where, np.float64),
        instruction=_instructions(rows, selection, where),
    )


def _instructions(rows: Any, selection: Selection, where: _Place) -> npt.NDArray[np.int64] | Sequence[object]:
    """Return the texts of a column, or its numbers of tasks."""
    key = _instruction_key(selection)
    if selection.style is not None:
        times = _scalars(rows, "timestamp", where, np.float64).tolist()
        return active_messages(rows.column(key).to_pylist(), selection.style, times, str(where))
    column = _flat_column(rows, key, where, size=1)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.to_pylist())
    if not pa.types.is_integer(column.type):
        raise DatasetError(
            f"{where}: {key!r} holds values of type {column.type}, neither texts nor numbers of tasks",
            "choose a different feature with --instruction-key",
        )
    numbers: npt.NDArray[np.int64] = column.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _concatenated(rows: Any, features: Sequence[Feature], where: _Place) -> FloatArray:
    """Return the values of several features side by side, (L, D)."""
    if not features:
        return np.zeros((rows.num_rows, 0), np.float32)
    parts = [_vectors(rows, feature, where) for feature in features]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _scalars(rows: Any, key: str, where: _Place, dtype: npt.DTypeLike) -> Any:
    """Return a column with one number per frame, which may be stored as a list of one."""
    return _flat_column(rows, key, where, size=1).to_numpy(zero_copy_only=False).astype(dtype)


def _vectors(rows: Any, feature: Feature, where: _Place) -> FloatArray:
    """Convert a column of scalars or (nested) lists to (L, D), row by row: float32 if that changes no number, else
    float64."""
    values = _flat_column(rows, feature.key, where, size=feature.size)
    try:
        flat = pc.cast(values, pa.float64(), safe=False)
    except pa.ArrowException as error:
        raise DatasetError(f"{where}: {feature.key!r} holds no numbers: {error}", "expected a float column") from error
    vectors = flat.to_numpy(zero_copy_only=False).reshape(rows.num_rows, feature.size)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DatasetError(f"{where}: {feature.key!r} is not finite in frame {bad[0]}", where.hint)
    # Copy, because arrow's memory is read-only, which torch warns about.
    return compact(vectors)


def _flat_column(rows: Any, key: str, where: _Place, *, size: int) -> Any:
    """Return the values of a column of scalars, or of lists nested to any depth, each frame with `size` values."""
    column = rows.column(key).combine_chunks()
    values, sizes = column, np.ones(len(column), np.int64)
    frame = np.arange(len(column))
    while True:
        if values.null_count:
            raise DatasetError(f"{where}: {key!r} has {values.null_count} empty values", where.hint)
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if not _is_list(values.type):
            break
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        frame = np.repeat(frame, lengths)
        sizes = np.bincount(frame, minlength=len(column))
        values = pc.list_flatten(values)
    if (sizes != size).any():
        raise DatasetError(
            f"{where}: {key!r} has vectors of {np.unique(sizes).tolist()} numbers, but meta/info.json declares {size}",
            "meta/info.json and the data files do not match",
        )
    return values


def flat_index(column: Any) -> Any:
    """Return a column of numbers; some datasets store each as a list of one."""
    return pc.list_flatten(column) if _is_list(column.type) else column


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))

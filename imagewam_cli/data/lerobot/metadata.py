"""Read the metadata of a dataset of either version: the files of each episode, and its position in them.

v2.1 has one data file and one mp4 per camera for each episode, listed in `meta/episodes.jsonl`. v3.0 packs many
episodes into each file and stores where each one begins in `meta/episodes/*/*.parquet`. `load_metadata` returns the
same type for both: an episode names its data file and, for each camera, an mp4 and the number of its first frame in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imagewam_cli.data.lerobot.info import Info, load_info
from imagewam_cli.errors import DatasetError
from imagewam_cli.files import sha256_of

_DAMAGED = "copy or download the dataset again"


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """Position of one episode in one mp4: its frame 0 is frame `first_frame` of the file."""

    path: Path
    first_frame: int
    is_last: bool
    """Whether this is the last episode in the mp4, which must then end with it."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One recorded episode and its files."""

    index: int
    length: int
    first_row: int
    """Number of rows of all episodes before it."""
    tasks: tuple[str, ...]
    data_file: Path
    videos: Mapping[str, VideoSpan]
    """feature key of each video camera -> position of its frames"""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of a dataset, known before any data file is opened."""

    info: Info
    tasks: Mapping[int, str]
    """task_index -> instruction"""
    episodes: tuple[Episode, ...]
    """All episodes, ascending by index."""
    identity: str
    """Hexadecimal SHA-256 of info.json, tasks, the episode table (index, length, tasks) and the statistics."""


@dataclass(frozen=True, kw_only=True)
class _EpisodeRow:
    """One line of the episode table, before positions are checked."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: Path
    videos: Mapping[str, VideoSpan]
    declared_first_row: int | None


def load_metadata(root: Path) -> Metadata:
    """Read and check the metadata of the dataset in `root`.

    Raises:
        DatasetError: a metadata file is missing or damaged, the version is not supported, the totals of info.json
            do not match the episode table, there are no episodes, or two episodes claim the same frames of a video.
    """
    info = load_info(root)
    if info.version == "v3.0":
        tasks = _tasks_v30(root)
        table, where = _episodes_v30(info), root / "meta/episodes"
        stats = root / "meta/stats.json"
    else:
        tasks = _tasks_v21(root)
        table, where = _episodes_v21(info), root / "meta/episodes.jsonl"
        stats = root / "meta/episodes_stats.jsonl"
    episodes = _locate(info, table, where)
    return Metadata(info=info, tasks=tasks, episodes=episodes, identity=_identity(info, tasks, episodes, stats))


def _identity(info: Info, tasks: Mapping[int, str], episodes: Sequence[Episode], stats: Path) -> str:
    content = {
        "info": info.raw,
        "tasks": sorted(tasks.items()),
        "episodes": [[episode.index, episode.length, episode.tasks] for episode in episodes],
        # Two recordings of a task can have the same lengths, but not the same statistics.
        "stats": sha256_of(stats) if stats.is_file() else None,
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _locate(info: Info, table: list[_EpisodeRow], where: Path) -> tuple[Episode, ...]:
    """Check the table against info.json, and compute where each episode begins in the dataset and in the videos."""
    if len(table) != info.total_episodes:
        raise DatasetError(
            f"{where} lists {len(table)} episodes, but {info.path} declares total_episodes {info.total_episodes}",
            "the recording or the copy is incomplete",
        )
    if not table:
        raise DatasetError(f"{info.root} has no episodes", "record or convert at least one episode")
    table = sorted(table, key=lambda row: row.index)
    for before, after in itertools.pairwise(table):
        if before.index == after.index:
            raise DatasetError(f"{where}: episode {after.index} is listed twice", _DAMAGED)

    *first_rows, total = itertools.accumulate((row.length for row in table), initial=0)
    for row, first_row in zip(table, first_rows, strict=True):
        if row.length < 1:
            raise DatasetError(f"{where}: episode {row.index} has length {row.length}", "remove the empty episode")
        if row.declared_first_row not in (None, first_row):
            raise DatasetError(
                f"{where}: episode {row.index} begins at row {row.declared_first_row}, "
                f"but the episodes before it hold {first_row} rows",
                "the dataset was merged or edited incorrectly; redo the merge or the edit",
            )
    if total != info.total_frames:
        raise DatasetError(
            f"{where}: the episodes hold {total} frames, but {info.path} declares total_frames {info.total_frames}",
            "the recording or the copy is incomplete",
        )

    last_spans = _last_spans(table, where)
    return tuple(
        Episode(
            index=row.index,
            length=row.length,
            first_row=first_row,
            tasks=row.tasks,
            data_file=row.data_file,
            videos={
                key: replace(span, is_last=last_spans[span.path] == span.first_frame)
                for key, span in row.videos.items()
            },
        )
        for row, first_row in zip(table, first_rows, strict=True)
    )


def _last_spans(table: Sequence[_EpisodeRow], where: Path) -> dict[Path, int]:
    """Return the first frame of the last episode in each mp4.

    Raises:
        DatasetError: two episodes overlap in an mp4 (after a merge that did not shift the time stamps).
    """
    by_file: defaultdict[Path, list[tuple[int, int, int]]] = defaultdict(list)
    for row in table:
        for span in row.videos.values():
            by_file[span.path].append((span.first_frame, row.length, row.index))
    last: dict[Path, int] = {}
    for path, spans in by_file.items():
        spans.sort()
        for (first, length, index), (next_first, _, next_index) in itertools.pairwise(spans):
            if first + length > next_first:
                raise DatasetError(
                    f"{where}: episodes {index} and {next_index} overlap in {path}: "
                    f"frames {first}..{first + length - 1} and {next_first}..",
                    "the dataset was merged or edited incorrectly; redo the merge or the edit",
                )
        last[path] = spans[-1][0]
    return last


def _tasks_v21(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.jsonl"
    return {line["task_index"]: line["task"] for line in _json_lines(path, {"task_index": int, "task": str})}


def _episodes_v21(info: Info) -> list[_EpisodeRow]:
    path = info.root / "meta/episodes.jsonl"
    cameras = [key for key, feature in info.features.items() if feature.is_camera and feature.is_video]
    rows = []
    for line in _json_lines(path, {"episode_index": int, "length": int, "tasks": list}):
        index, length = line["episode_index"], line["length"]
        numbers = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        rows.append(
            _EpisodeRow(
                index=index,
                length=length,
                tasks=tuple(str(task) for task in line["tasks"]),
                data_file=info.data_file(**numbers),
                videos={
                    key: VideoSpan(path=info.video_file(key, **numbers), first_frame=0, is_last=True) for key in cameras
                },
                declared_first_row=None,
            )
        )
    return rows


def _json_lines(path: Path, required: Mapping[str, type]) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing", _DAMAGED) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}: not valid JSON: {error}", _DAMAGED) from error
        for key, kind in required.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise DatasetError(f"{path}, line {number}: {key!r} is missing or not {kind.__name__}", _DAMAGED)
        yield entry


def _tasks_v30(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.parquet"
    table = _read_parquet(path)
    # The instruction is the index of a pandas table: stored under the index's name, or under this one if it had none.
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path} has columns {table.column_names}, but needs 'task_index' and 'task'", _DAMAGED)
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _episodes_v30(info: Info) -> list[_EpisodeRow]:
    folder = info.root / "meta/episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files and info.total_episodes:
        raise DatasetError(f"{folder} holds no parquet file", "the recording was never finished, or the copy failed")
    cameras = [key for key, feature in info.features.items() if feature.is_camera and feature.is_video]
    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for key in cameras:
        wanted += [f"videos/{key}/{field}" for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    # Read only these columns: the statistics of the episodes are a hundred times larger.
    return [_episode_v30(info, path, cameras, row) for path in files for row in _read_parquet(path, wanted).to_pylist()]


def _episode_v30(info: Info, path: Path, cameras: Sequence[str], row: Mapping[str, Any]) -> _EpisodeRow:
    index, length = row["episode_index"], row["length"]
    empty = [name for name, value in row.items() if value is None]
    if empty:
        raise DatasetError(f"{path}: episode {index} has no {empty[0]!r}", _DAMAGED)
    videos = {}
    for key in cameras:
        start, end = row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"]
        # Compare whole frames: the time stamps are sums of floats and drift over many episodes.
        seconds_as_frames = round((end - start) * info.fps)
        if seconds_as_frames != length:
            raise DatasetError(
                f"{path}: episode {index} has {length} rows, but {seconds_as_frames} frames of {key!r} "
                f"({start} s .. {end} s at {info.fps:g} fps)",
                "the dataset was merged or edited incorrectly; redo the merge or the edit",
            )
        videos[key] = VideoSpan(
            path=info.video_file(
                key,
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            ),
            first_frame=round(start * info.fps),
            is_last=False,
        )
    return _EpisodeRow(
        index=index,
        length=length,
        tasks=tuple(row["tasks"]),
        data_file=info.data_file(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]),
        videos=videos,
        declared_first_row=row["dataset_from_index"],
    )


def _read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a small metadata table as a whole."""
    try:
        file = pq.ParquetFile(path)
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise DatasetError(f"{path} has no column {missing[0]!r}", _DAMAGED)
        return file.read(columns=list(columns) if columns else None)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing", _DAMAGED) from error
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} is not a readable parquet file: {error}", "the recording was never finished, or the copy failed"
        ) from error

"""Read the metadata of a dataset of any version: the files of each episode, and its position in them.

v2 has one data file and one mp4 per camera for each episode, listed in `meta/episodes.jsonl`. v3 packs many episodes
into each file and stores where each one begins in `meta/episodes/*/*.parquet`. `load_metadata` returns the same type
for both: an episode names its data file and, for each camera, an mp4 and its declared position in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imagewam_cli.data.lerobot.info import Info, load_info
from imagewam_cli.data.lerobot.json_text import DAMAGED, read_json_lines
from imagewam_cli.errors import DatasetError, warn
from imagewam_cli.file_content import content_fault
from imagewam_cli.files import local_name, sha256_of


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """Position of one episode in one mp4, as the metadata declare it; `video_files` checks it against the file."""

    path: Path
    start: float
    """Frames of the mp4 before the episode. Seconds times frames per second, so it may be off by a fraction."""
    end: float
    """Frames of the mp4 before the end of the episode."""


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
    """feature key of each video camera -> position of its frames; a camera without a position is missing"""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of a dataset, known before any data file is opened."""

    info: Info
    tasks: Mapping[int, object]
    """task_index -> instruction, which is checked when a frame needs it"""
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
    if info.layout == "v3":
        tasks = _tasks_v30(root)
        table, where = _episodes_v30(info), root / "meta/episodes"
        stats = root / "meta/stats.json"
    else:
        tasks = _tasks_v21(root)
        table, where = _episodes_v21(info), root / "meta/episodes.jsonl"
        # v2.0 stores the statistics of the whole dataset, v2.1 those of each episode.
        stats = root / ("meta/stats.json" if info.version == "v2.0" else "meta/episodes_stats.jsonl")
    episodes = _locate(info, table, where)
    return Metadata(info=info, tasks=tasks, episodes=episodes, identity=_identity(info, tasks, episodes, stats))


def _identity(info: Info, tasks: Mapping[int, object], episodes: Sequence[Episode], stats: Path) -> str:
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
    if not table:
        raise DatasetError(f"{info.root} has no episodes", "record or convert at least one episode")
    table = sorted(table, key=lambda row: row.index)
    for before, after in itertools.pairwise(table):
        if before.index == after.index:
            raise DatasetError(f"{where}: episode {after.index} is listed twice", DAMAGED)

    *first_rows, total = itertools.accumulate((row.length for row in table), initial=0)
    _warn_about_totals(info, len(table), total, where)
    moved = [
        row.index
        for row, first_row in zip(table, first_rows, strict=True)
        if row.declared_first_row not in (None, first_row)
    ]
    if moved:
        # Rows are found by episode_index, so this column is not needed.
        warn(
            f"{where}: 'dataset_from_index' is not the number of rows before the episode (the first is episode "
            f"{moved[0]}); it is ignored, and rows are found by their episode_index"
        )

    return tuple(
        Episode(
            index=row.index,
            length=row.length,
            first_row=first_row,
            tasks=row.tasks,
            data_file=row.data_file,
            videos=row.videos,
        )
        for row, first_row in zip(table, first_rows, strict=True)
    )


def _warn_about_totals(info: Info, episodes: int, frames: int, where: Path) -> None:
    """Warn if the totals of info.json are not those of the episode table, which is what is read."""
    wrong = [
        f"{name} {declared}, but the table has {found}"
        for name, declared, found in (
            ("total_episodes", info.total_episodes, episodes),
            ("total_frames", info.total_frames, frames),
        )
        if declared not in (None, found)
    ]
    if wrong:
        warn(
            f"{info.path} declares {' and '.join(wrong)} ({where}); the table is read. If episodes are missing, copy "
            "or download the dataset again"
        )


def _tasks_v21(root: Path) -> dict[int, object]:
    path = root / "meta/tasks.jsonl"
    lines = _json_lines(path, {"task_index": int})
    return _numbered(path, ((line["task_index"], line.get("task")) for line in lines))


def _episodes_v21(info: Info) -> list[_EpisodeRow]:
    path = info.root / "meta/episodes.jsonl"
    cameras = [key for key, feature in info.features.items() if feature.is_camera and feature.is_video]
    rows = []
    for line in _json_lines(path, {"episode_index": int, "length": int}):
        index, length = line["episode_index"], line["length"]
        numbers = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        rows.append(
            _EpisodeRow(
                index=index,
                length=length,
                tasks=_episode_tasks(line.get("tasks")),
                data_file=info.data_file(**numbers),
                videos={key: VideoSpan(path=info.video_file(key, **numbers), start=0, end=length) for key in cameras},
                declared_first_row=None,
            )
        )
    return rows


def _json_lines(path: Path, required: Mapping[str, type]) -> Iterator[Mapping[str, Any]]:
    for number, entry in read_json_lines(path):
        for key, kind in required.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise DatasetError(f"{path}, line {number}: {key!r} is missing or not {kind.__name__}", DAMAGED)
        yield entry


def _tasks_v30(root: Path) -> dict[int, object]:
    path = root / "meta/tasks.parquet"
    table = _read_parquet(path)
    # The instruction is the index of a pandas table: stored under the index's name, or under this one if it had none.
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path} has columns {table.column_names}, but needs 'task_index' and 'task'", DAMAGED)
    return _numbered(path, zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _numbered(path: Path, tasks: Iterable[tuple[int, object]]) -> dict[int, object]:
    """Return the instructions by task_index.

    Raises:
        DatasetError: a number has two instructions.
    """
    found: dict[int, object] = {}
    for number, text in tasks:
        if found.setdefault(number, text) != text:
            raise DatasetError(
                f"{path}: task_index {number} has two instructions, {found[number]!r} and {text!r}",
                "give each instruction its own task_index, in this file and in the data files",
            )
    return found


def _episodes_v30(info: Info) -> list[_EpisodeRow]:
    folder = info.root / "meta/episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files and info.total_episodes:
        raise DatasetError(f"{folder} holds no parquet file", "the recording was never finished, or the copy failed")
    cameras = [key for key, feature in info.features.items() if feature.is_camera and feature.is_video]
    needed = ["episode_index", "length"]
    others = ["tasks", *_DATA_FILE, "dataset_from_index"]
    others += [f"videos/{key}/{field}" for key in cameras for field in _VIDEO_FIELDS]
    # Read only these columns: the statistics of the episodes are a hundred times larger.
    return [
        _episode_v30(info, path, cameras, row)
        for path in files
        for row in _read_parquet(path, needed, others).to_pylist()
    ]


_DATA_FILE = ("data/chunk_index", "data/file_index")
_VIDEO_FIELDS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def _episode_v30(info: Info, path: Path, cameras: Sequence[str], row: Mapping[str, Any]) -> _EpisodeRow:
    index, length = row["episode_index"], row["length"]
    if index is None or length is None:
        raise DatasetError(f"{path} has an episode without {'episode_index' if index is None else 'length'!r}", DAMAGED)
    videos = {}
    for key in cameras:
        position: list[Any] = [row.get(f"videos/{key}/{field}") for field in _VIDEO_FIELDS]
        if None not in position:
            chunk, file, start, end = position
            videos[key] = VideoSpan(
                path=info.video_file(key, chunk_index=int(chunk), file_index=int(file)),
                start=start * info.fps,
                end=end * info.fps,
            )
    # Without a number, the rows are looked for in every file.
    data_chunk, data_file = (int(row.get(field) or 0) for field in _DATA_FILE)
    first_row = row.get("dataset_from_index")
    return _EpisodeRow(
        index=int(index),
        length=int(length),
        tasks=_episode_tasks(row.get("tasks")),
        data_file=info.data_file(chunk_index=data_chunk, file_index=data_file),
        videos=videos,
        declared_first_row=None if first_row is None else int(first_row),
    )


def _episode_tasks(tasks: object) -> tuple[str, ...]:
    """Return an episode's instructions, none if they are not listed: each frame names its own by `task_index`."""
    if isinstance(tasks, str):
        return (tasks,)
    return tuple(str(task) for task in tasks) if isinstance(tasks, list) else ()


def _read_parquet(path: Path, needed: Sequence[str] | None = None, others: Sequence[str] = ()) -> Any:
    """Read a small metadata table: all columns, or the `needed` ones and those of `others` that exist."""
    try:
        file = pq.ParquetFile(local_name(path))
        existing = set(file.schema_arrow.names)
        missing = sorted(set(needed or ()) - existing)
        if missing:
            raise DatasetError(f"{path} has no column {missing[0]!r}", DAMAGED)
        return file.read(columns=None if needed is None else [*needed, *(c for c in others if c in existing)])
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing", DAMAGED) from error
    except (pa.ArrowException, OSError) as error:
        raise unreadable_parquet(path, str(path), error) from error


def unreadable_parquet(path: Path, where: str, error: Exception) -> DatasetError:
    """Return the error for a file that pyarrow cannot read. where: the path, with what else locates the fault."""
    fault = content_fault(path)
    if fault is not None:
        return DatasetError(f"{where} {fault.problem}", fault.hint)
    return DatasetError(
        f"{where} is not a readable parquet file: {error}", "the recording was never finished, or the copy failed"
    )

"""Test datasets as merges, conversions, deletions and downloads leave them: read right with a warning, or blamed.

Every picture carries its own number, and the state of its row carries the same: no picture may meet another's row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.episodes import EpisodeSelection
from imagewam_cli.data.lerobot.reader import LeRobotDataset
from imagewam_cli.data.types import KeyMap, Row
from imagewam_cli.errors import DatasetError, ImagewamWarning
from tests.support.faults import LFS_POINTER
from tests.support.recordings import (
    FPS,
    Recording,
    edit_json,
    edit_table,
    encode_mp4,
    set_column,
    write_v21,
    write_v30,
)

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
TOP = "observation.images.top"
TOP_MP4 = f"videos/{TOP}/chunk-000/file-000.mp4"
SIZE = (32, 64)
LENGTHS = (12, 9, 15)
BITS = 8


def numbered(number: int) -> np.ndarray:
    """Draw a number as black and white stripes, one per bit."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.repeat(np.repeat(np.array(bits, np.uint8), SIZE[1] // BITS)[None, :, None], SIZE[0], 0).repeat(3, 2)


def number_of(picture: np.ndarray) -> int:
    stripes = picture[8:-8].mean(axis=(0, 2)).reshape(BITS, -1)[:, 2:-2].mean(axis=1)
    return sum(1 << bit for bit, level in enumerate(stripes) if level > 127)


def code(episode: int, frame: int) -> int:
    return 20 * episode + frame + 1


def recordings(lengths: Sequence[int] = LENGTHS) -> list[Recording]:
    return [
        Recording(
            frames={"top": np.stack([numbered(code(episode, frame)) for frame in range(length)])},
            states=np.array([[code(episode, frame), 0, 0] for frame in range(length)], np.float32),
            actions=np.random.default_rng(episode).normal(size=(length, 2)).astype(np.float32),
            instruction="move",
        )
        for episode, length in enumerate(lengths)
    ]


def require_pairs(rows: Sequence[Row]) -> None:
    """Check that every picture is that of its row."""
    for row in rows:
        assert int(row.state[0]) == code(row.episode, row.frame)
        assert {number_of(picture) for picture in row.images.values()} == {code(row.episode, row.frame)}


def read(root: Path, **selection: Any) -> list[Row]:
    rows = list(LeRobotDataset(root, KeyMap(), EpisodeSelection.of(**selection)).rows())
    require_pairs(rows)
    return rows


@pytest.fixture(scope="module")
def original30(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v30(tmp_path_factory.mktemp("sets") / "v30", recordings())


@pytest.fixture(scope="module")
def original21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v21(tmp_path_factory.mktemp("sets") / "v21", recordings())


@pytest.fixture
def v30(original30: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original30, tmp_path / "set"))


@pytest.fixture
def v21(original21: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original21, tmp_path / "set"))


def edit_episodes(root: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the rows of the episode table, without its statistics."""
    rows = pq.read_table(root / EPISODES).to_pylist()
    rows = [{key: value for key, value in row.items() if not key.startswith("stats/")} for row in rows]
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows), root / EPISODES)


def put_offsets(root: Path, spans: Sequence[tuple[float, float]]) -> None:
    """Declare the span of each episode in the mp4, in frames."""

    def edit(rows: list[dict[str, Any]]) -> None:
        for row, (start, end) in zip(rows, spans, strict=True):
            row[f"videos/{TOP}/from_timestamp"] = start / FPS
            row[f"videos/{TOP}/to_timestamp"] = end / FPS

    edit_episodes(root, edit)


def split_data(root: Path) -> None:
    """Put the rows of episodes 1 and 2 into a second data file; the episode table does not say so."""
    table = pq.read_table(root / DATA)
    pq.write_table(table.slice(12), root / "data/chunk-000/file-001.parquet")
    pq.write_table(table.slice(0, 12), root / DATA)


def drop_episode(root: Path, gone: int) -> None:
    """Delete an episode from the tables, but not its frames from the mp4."""
    edit_episodes(root, lambda rows: rows.pop(gone))
    edit_episodes(root, _renumber_rows)
    edit_table(root / DATA, lambda t: t.filter(pa.compute.not_equal(t["episode_index"], gone)))
    edit_json(
        root / "meta/info.json",
        lambda info: info.update(total_episodes=2, total_frames=sum(LENGTHS) - LENGTHS[gone]),
    )


def _renumber_rows(rows: list[dict[str, Any]]) -> None:
    start = 0
    for row in rows:
        row["dataset_from_index"], row["dataset_to_index"] = start, start + row["length"]
        start += row["length"]


class TestRows:
    def test_rows_in_another_data_file_than_the_table_names_are_found(self, v30: Path) -> None:
        split_data(v30)
        with pytest.warns(
            ImagewamWarning, match=r"data file of episodes 1-2 is not .*episode 1 in .*file-001\.parquet"
        ):
            assert len(read(v30)) == 36

    def test_rows_are_found_without_any_file_number(self, v30: Path) -> None:
        split_data(v30)
        edit_table(v30 / EPISODES, lambda t: t.drop_columns(["data/file_index", "data/chunk_index"]))
        with pytest.warns(ImagewamWarning, match="data file of episodes 1-2"):
            assert len(read(v30)) == 36

    @pytest.mark.parametrize("group", [1, 7, 100])
    def test_row_groups_of_any_size_are_searched(self, v30: Path, group: int) -> None:
        split_data(v30)
        path = v30 / "data/chunk-000/file-001.parquet"
        edit_table(path, lambda t: t, row_group_size=group)
        with pytest.warns(ImagewamWarning, match="data file of episodes 1-2"):
            assert len(read(v30)) == 36

    @pytest.mark.parametrize("size", [-1, 1])
    def test_numbers_may_be_lists_of_one(self, v30: Path, size: int) -> None:
        def wrap(table: pa.Table) -> pa.Table:
            for key in ("timestamp", "frame_index", "episode_index", "task_index"):
                kind = pa.list_(table.schema.field(key).type, size)
                lists = pa.array([[value] for value in table[key].to_pylist()], kind)
                table = table.set_column(table.schema.get_field_index(key), key, lists)
            return table

        edit_table(v30 / DATA, wrap)
        rows = read(v30)
        assert [row.timestamp for row in rows[:3]] == pytest.approx([0.0, 0.1, 0.2])
        assert {row.instruction for row in rows} == {"move"}

    def test_an_episode_whose_rows_are_nowhere_is_named(self, v30: Path) -> None:
        edit_table(v30 / DATA, lambda t: t.slice(0, 21))
        with pytest.raises(DatasetError, match="episode 2: no data file has rows of the episode") as caught:
            LeRobotDataset(v30).rows()
        assert caught.value.hint == "leave out what cannot be read: --exclude-episodes 2"
        assert len(read(v30, exclude="2")) == 21

    def test_scrambled_row_numbers_are_ignored_aloud(self, v30: Path) -> None:
        edit_table(v30 / EPISODES, lambda t: set_column(t, "dataset_from_index", [0, 24, 6]))
        with pytest.warns(ImagewamWarning, match=r"'dataset_from_index' .* \(the first is episode 1\)"):
            assert [row.row for row in read(v30)] == list(range(36))

    @pytest.mark.parametrize("column", ["tasks", "dataset_from_index", "dataset_to_index"])
    def test_columns_that_are_not_needed_may_be_missing_or_null(self, v30: Path, column: str) -> None:
        edit_episodes(v30, lambda rows: rows[1].update({column: None}))
        assert len(read(v30)) == 36
        edit_episodes(v30, lambda rows: [row.pop(column) for row in rows])
        assert len(read(v30)) == 36

    @pytest.mark.parametrize("tasks", [None, "move", [], ["move", "stop"]])
    def test_v21_episodes_may_list_any_tasks(self, v21: Path, tasks: object) -> None:
        path = v21 / "meta/episodes.jsonl"
        lines = [json.loads(line) | {"tasks": tasks} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert len(read(v21)) == 36


class TestOffsets:
    @pytest.mark.parametrize(
        "spans",
        [
            [(7, 19), (19, 28), (28, 43)],  # not reset for this file
            [(0, 12.4), (12.4, 21.8), (21.8, 37.2)],  # a fraction more per episode
            [(0, 10), (10, 19), (19, 34)],  # lengths of another rate
        ],
    )
    def test_lengths_tell_the_frames_if_they_fill_the_file(self, v30: Path, spans: list[tuple[float, float]]) -> None:
        put_offsets(v30, spans)
        with pytest.warns(ImagewamWarning, match=r"file-000\.mp4 does not have its episodes where the offsets .* say"):
            assert len(read(v30)) == 36

    @pytest.mark.parametrize("gone", [0, 1])
    def test_frames_of_a_deleted_episode_are_skipped_silently(
        self, v30: Path, gone: int, recwarn: pytest.WarningsRecorder
    ) -> None:
        drop_episode(v30, gone)
        assert len(read(v30)) == 36 - LENGTHS[gone]
        assert not recwarn.list

    def test_frames_of_a_deleted_last_episode_are_ignored_aloud(self, v30: Path) -> None:
        drop_episode(v30, 2)
        with pytest.warns(ImagewamWarning, match=r"file-000\.mp4 ends with 15 frames that belong to no episode"):
            assert len(read(v30)) == 21

    def test_drift_in_a_file_with_frames_of_nobody_blames_the_offsets(self, v30: Path) -> None:
        put_offsets(v30, [(0, 12.4), (12.4, 21.8), (21.8, 37.2)])
        drop_episode(v30, 2)
        with pytest.warns(ImagewamWarning, match="ends with"), pytest.raises(DatasetError) as caught:
            LeRobotDataset(v30).rows()
        assert "episode 1: the video has no frame at the offset of episode 1" in str(caught.value)
        with pytest.warns(ImagewamWarning, match="ends with"):
            assert len(read(v30, exclude="1")) == 12

    def test_offsets_that_overlap_are_blamed(self, v30: Path) -> None:
        put_offsets(v30, [(0, 12), (0, 9), (21, 36)])
        with pytest.raises(DatasetError, match=r"episodes? 0.*: their offsets in the episode table overlap") as caught:
            LeRobotDataset(v30).rows()
        assert caught.value.hint == "leave out what cannot be read: --exclude-episodes 0-1"
        assert len(read(v30, only="2")) == 15

    def test_a_camera_without_a_position_matters_only_if_it_is_read(self, tmp_path: Path) -> None:
        two = [
            Recording(
                frames={"top": r.frames["top"], "side": r.frames["top"]},
                states=r.states,
                actions=r.actions,
                instruction=r.instruction,
            )
            for r in recordings()
        ]
        root = write_v30(tmp_path / "set", two)
        edit_table(root / EPISODES, lambda t: t.drop_columns(["videos/observation.images.side/file_index"]))
        shutil.rmtree(root / "videos/observation.images.side")
        with pytest.raises(DatasetError, match=r"no position in the videos of 'observation\.images\.side'"):
            LeRobotDataset(root).rows()
        require_pairs(list(LeRobotDataset(root, KeyMap(cameras=("top",))).rows()))


class TestFrames:
    def test_all_short_videos_are_listed_at_once(self, v21: Path) -> None:
        for episode in (0, 2):
            frames = recordings()[episode].frames["top"]
            encode_mp4(v21 / f"videos/chunk-{episode // 2:03d}/{TOP}/episode_{episode:06d}.mp4", frames[:-2])
        with pytest.raises(DatasetError) as caught:
            LeRobotDataset(v21).rows()
        assert caught.value.message.startswith("2 of 3 episodes cannot be read: ")
        assert "episode_000000.mp4, episode 0: the video has 10 frames for the 12 rows of the episode" in str(
            caught.value
        )
        assert "episode_000002.mp4, episode 2: the video has 13 frames for the 15 rows of the episode" in str(
            caught.value
        )
        assert caught.value.hint == "leave out what cannot be read: --exclude-episodes 0,2"
        assert len(read(v21, exclude="0,2")) == 9
        assert len(list(LeRobotDataset(v21).rows(images=False))) == 36

    def test_another_frame_rate_is_named(self, v21: Path) -> None:
        edit_json(v21 / "meta/info.json", lambda info: info.update(fps=30))
        with pytest.warns(ImagewamWarning) as caught:
            assert len(read(v21)) == 36
        (message,) = [str(warning.message) for warning in caught]
        assert "plays 10 frames per second, but meta/info.json declares 30 (and 2 more files like it)" in message

    def test_a_partial_download_names_the_episodes_that_are_there(self, v21: Path) -> None:
        (v21 / f"videos/chunk-001/{TOP}/episode_000002.mp4").unlink()
        with pytest.raises(DatasetError, match=r"episode_000002\.mp4, episode 2: the file is missing") as caught:
            LeRobotDataset(v21).rows()
        assert caught.value.hint == (
            "download the missing files, or read the episodes that are there: --only-episodes 0-1"
        )
        assert len(read(v21, only="0,1")) == 21

    def test_pointers_of_git_lfs_are_recognized(self, v21: Path) -> None:
        for path in v21.rglob("*.mp4"):
            path.write_bytes(LFS_POINTER)
        with pytest.raises(
            DatasetError,
            match=r"3 of 3 episodes cannot be read: .*000000\.mp4, episode 0: the file is a Git LFS pointer, not the "
            r"file itself \(and 2 more files like it\)",
        ) as caught:
            LeRobotDataset(v21).rows()
        assert "git lfs pull" in str(caught.value.hint)

    @pytest.mark.parametrize("name", [DATA, TOP_MP4, EPISODES, "meta/tasks.parquet", "meta/info.json"])
    def test_pointers_of_git_lfs_are_recognized_in_any_file(self, v30: Path, name: str) -> None:
        (v30 / name).write_bytes(LFS_POINTER)
        with pytest.raises(DatasetError, match=f"{Path(name).name}.* is a Git LFS pointer") as caught:
            LeRobotDataset(v30).rows()
        assert "git lfs pull" in str(caught.value.hint)

"""Test metadata of both versions: the location of episodes, the dataset's identity, and refused tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.episodes import EpisodeSelection
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.lerobot.metadata import load_metadata
from imagewam_cli.errors import DatasetError
from tests.support.recordings import LENGTHS, Recording, edit_json, edit_table, record, set_column, write_v21, write_v30

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
TOP = "observation.images.top"


@pytest.fixture
def copy30(v30: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v30, tmp_path / "v30"))


@pytest.fixture
def copy21(v21: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v21, tmp_path / "v21"))


def test_v30_episodes_share_files(v30: Path) -> None:
    episodes = load_metadata(v30).episodes
    assert [episode.length for episode in episodes] == list(LENGTHS)
    assert {episode.data_file for episode in episodes} == {v30 / "data/chunk-000/file-000.parquet"}
    spans = [episode.videos[TOP] for episode in episodes]
    assert {span.path for span in spans} == {v30 / f"videos/{TOP}/chunk-000/file-000.mp4"}
    assert [(span.start, span.end) for span in spans] == [(0, 5), (5, 12), (12, 16)]


def test_v21_episodes_have_their_own_files_in_chunks(v21: Path) -> None:
    episodes = load_metadata(v21).episodes
    assert episodes[2].data_file == v21 / "data/chunk-001/episode_000002.parquet"
    assert episodes[2].videos[TOP].path == v21 / f"videos/chunk-001/{TOP}/episode_000002.mp4"
    assert [(e.videos[TOP].start, e.videos[TOP].end) for e in episodes] == [(0, 5), (0, 7), (0, 4)]


def test_both_versions_list_the_same_tasks(v21: Path, v30: Path) -> None:
    expected = {0: "push the red cube", 1: "open the drawer"}
    assert load_metadata(v21).tasks == load_metadata(v30).tasks == expected


def test_an_index_that_pandas_left_unnamed_is_found(copy30: Path) -> None:
    edit_table(copy30 / "meta/tasks.parquet", lambda t: t.rename_columns(["task_index", "__index_level_0__"]))
    assert load_metadata(copy30).tasks[1] == "open the drawer"


def test_path_templates_of_info_json_are_followed(copy30: Path) -> None:
    (copy30 / "data/chunk-000/file-000.parquet").rename(copy30 / "rows_0_0.parquet")
    edit_json(copy30 / "meta/info.json", lambda i: i.update(data_path="rows_{chunk_index}_{file_index}.parquet"))
    assert load_metadata(copy30).episodes[0].data_file == copy30 / "rows_0_0.parquet"


def test_episodes_may_be_spread_over_files_in_any_order(copy30: Path) -> None:
    table = pq.read_table(copy30 / EPISODES)
    pq.write_table(table.slice(1), copy30 / EPISODES)
    pq.write_table(table.slice(0, 1), copy30 / "meta/episodes/chunk-000/file-001.parquet")
    assert [episode.index for episode in load_metadata(copy30).episodes] == [0, 1, 2]


class TestIdentity:
    def test_is_the_same_for_a_copy(self, v30: Path, copy30: Path, v21: Path, copy21: Path) -> None:
        assert load_metadata(v30).identity == load_metadata(copy30).identity
        assert load_metadata(v21).identity == load_metadata(copy21).identity
        assert load_metadata(v21).identity != load_metadata(v30).identity
        assert len(load_metadata(v30).identity) == 64

    def test_does_not_depend_on_how_info_is_written(self, v30: Path, copy30: Path) -> None:
        path = copy30 / "meta/info.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(dict(reversed(content.items()))))
        assert load_metadata(copy30).identity == load_metadata(v30).identity

    @pytest.mark.parametrize(
        "other",
        [
            record((5, 7, 5)),
            record((7, 5, 4)),
            record(seed=1),
            [*record()[:2], Recording(**{**vars(record()[2]), "instruction": "do something else"})],
        ],
        ids=["length", "order of lengths", "numbers of equal lengths", "instruction"],
    )
    def test_changes_with_the_recording(self, other: list[Recording], v30: Path, tmp_path: Path) -> None:
        root = write_v30(tmp_path / "other", other)
        assert load_metadata(root).identity != load_metadata(v30).identity

    def test_changes_with_the_frame_rate(self, v21: Path, copy21: Path) -> None:
        edit_json(copy21 / "meta/info.json", lambda info: info.update(fps=20))
        assert load_metadata(copy21).identity != load_metadata(v21).identity


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: set_column(t, "episode_index", [0, 1, 1]), "episode 1 is listed twice"),
        (lambda t: set_column(t, "length", [5, None, 11]), "has an episode without 'length'"),
        (lambda t: t.drop_columns(["length"]), "has no column 'length'"),
    ],
)
def test_a_broken_v30_episode_table_is_refused(
    copy30: Path, edit: Callable[[pa.Table], pa.Table], message: str
) -> None:
    edit_table(copy30 / EPISODES, edit)
    with pytest.raises(DatasetError, match=message):
        load_metadata(copy30)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (EPISODES, lambda path: path.unlink(), "meta/episodes holds no parquet file"),
        (
            EPISODES,
            lambda path: path.write_bytes(path.read_bytes()[:-20]),
            "file-000.parquet is a parquet file without its end",
        ),
        ("meta/tasks.parquet", lambda path: path.unlink(), "tasks.parquet is missing"),
        ("meta/tasks.parquet", lambda path: pq.write_table(pa.table({"a": [1]}), path), r"has columns \['a'\]"),
    ],
)
def test_a_damaged_v30_metadata_file_is_named(
    copy30: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy30 / name)
    with pytest.raises(DatasetError, match=message):
        load_metadata(copy30)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("episodes.jsonl", None, "episodes.jsonl is missing"),
        ("episodes.jsonl", '{"episode_index": 0,\n', "episodes.jsonl, line 1: not valid JSON"),
        ("episodes.jsonl", '\n{"episode_index": 0, "tasks": []}\n', "line 2: 'length' is missing or not int"),
        (
            "tasks.jsonl",
            '{"task_index": "0", "task": "x"}\n',
            "tasks.jsonl, line 1: 'task_index' is missing or not int",
        ),
    ],
)
def test_a_damaged_v21_metadata_file_is_named(copy21: Path, name: str, text: str | None, message: str) -> None:
    path = copy21 / "meta" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_metadata(copy21)


def test_an_empty_episode_is_refused_unless_it_is_left_out(copy21: Path) -> None:
    path = copy21 / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 7', '"length": 0'))
    with pytest.raises(DatasetError, match="episode 1: its length is 0") as caught:
        open_dataset(copy21)
    assert str(caught.value.hint).endswith("--exclude-episodes 1")
    assert len(list(open_dataset(copy21, episodes=EpisodeSelection.of(exclude="1")).rows())) == 9


def test_episode_numbers_may_have_gaps(tmp_path: Path) -> None:
    root = write_v21(tmp_path / "set", record((3, 4), {"top": (32, 32)}))
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"episode_index": 1', '"episode_index": 9'))
    assert [(e.index, e.first_row) for e in load_metadata(root).episodes] == [(0, 0), (9, 3)]


def test_a_task_number_with_two_instructions_is_refused(copy21: Path, copy30: Path) -> None:
    (copy21 / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "a"}\n{"task_index": 0, "task": "b"}\n')
    pq.write_table(pa.table({"task_index": [0, 0], "task": ["a", "b"]}), copy30 / "meta/tasks.parquet")
    for root, file in ((copy21, "tasks.jsonl"), (copy30, "tasks.parquet")):
        with pytest.raises(DatasetError, match=rf"{file}: task_index 0 has two instructions, 'a' and 'b'"):
            load_metadata(root)


def test_a_task_that_is_listed_twice_alike_is_read(copy30: Path) -> None:
    pq.write_table(pa.table({"task_index": [0, 1, 1], "task": ["a", "b", "b"]}), copy30 / "meta/tasks.parquet")
    assert load_metadata(copy30).tasks == {0: "a", 1: "b"}

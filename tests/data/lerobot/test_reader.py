"""Compare rows of both dataset versions with the original recording, and check the errors of broken datasets."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.lerobot import tables
from imagewam_cli.data.lerobot.reader import LeRobotDataset
from imagewam_cli.data.types import Dataset, KeyMap, Row
from imagewam_cli.errors import DatasetError, ImagewamWarning, UsageError
from tests.support.recordings import (
    CAMERAS,
    FPS,
    LENGTHS,
    Recording,
    decode_mp4,
    edit_json,
    edit_table,
    encode_mp4,
    record,
    set_column,
    write_v21,
    write_v30,
)

DATA = "data/chunk-000/file-000.parquet"
TOP = "observation.images.top"
TOP_MP4 = f"videos/{TOP}/chunk-000/file-000.mp4"

ALL_FORMS = pytest.mark.parametrize("form", ["v30", "v30_pictures", "v21"])


@pytest.fixture
def copy30(v30: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v30, tmp_path / "v30"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Return a counter of how often each video file is opened."""
    counter: collections.Counter[str] = collections.Counter()
    real_open = av.open

    def counting_open(file: str, *args: Any, **options: Any) -> Any:
        counter["/".join(Path(file).parts[-3:])] += 1
        return real_open(file, *args, **options)

    monkeypatch.setattr(av, "open", counting_open)
    return counter


def expected_rows(recordings: list[Recording]) -> Iterator[tuple[int, int, Recording]]:
    """Yield (episode, frame, recording) for every row of the dataset."""
    for episode, recording in enumerate(recordings):
        for frame in range(len(recording.states)):
            yield episode, frame, recording


def assert_rows_equal(rows: list[Row], recordings: list[Recording]) -> None:
    for number, (row, (episode, frame, recording)) in enumerate(zip(rows, expected_rows(recordings), strict=True)):
        assert (row.row, row.episode, row.frame) == (number, episode, frame)
        assert row.timestamp == pytest.approx(frame / FPS)
        assert row.instruction == recording.instruction
        assert row.state.dtype == row.action.dtype == np.float32
        np.testing.assert_array_equal(row.state, recording.states[frame])
        np.testing.assert_array_equal(row.action, recording.actions[frame])


@ALL_FORMS
def test_every_recorded_row_is_read(form: str, recordings: list[Recording], request: pytest.FixtureRequest) -> None:
    dataset: Dataset = LeRobotDataset(request.getfixturevalue(form))
    rows = list(dataset.rows())
    assert_rows_equal(rows, recordings)
    for row, (_, frame, recording) in zip(rows, expected_rows(recordings), strict=True):
        assert list(row.images) == list(CAMERAS)
        for camera, pixels in row.images.items():
            assert pixels.dtype == np.uint8
            # Neighbouring frames and episodes differ by at least 20 levels, lossy coding changes only a few.
            difference = np.abs(pixels.astype(int) - recording.frames[camera][frame]).mean()
            assert difference <= (0 if form == "v30_pictures" else 4)


def test_pictures_equal_an_independent_decoding(v30: Path, v21: Path) -> None:
    rows = list(LeRobotDataset(v30).rows())
    np.testing.assert_array_equal(np.stack([row.images["top"] for row in rows]), decode_mp4(v30 / TOP_MP4))
    rows = [row for row in LeRobotDataset(v21).rows() if row.episode == 2]
    path = v21 / f"videos/chunk-001/{TOP}/episode_000002.mp4"
    np.testing.assert_array_equal(np.stack([row.images["top"] for row in rows]), decode_mp4(path))


def test_numbers_equal_an_independent_reading(v30: Path) -> None:
    stored = pq.read_table(v30 / DATA).to_pylist()
    for row, line in zip(LeRobotDataset(v30).rows(images=False), stored, strict=True):
        assert row.state.tolist() == line["observation.state"]
        assert row.timestamp == line["timestamp"]
        assert row.row == line["index"]


@ALL_FORMS
def test_arrays_can_be_shared_with_torch_without_a_copy(form: str, request: pytest.FixtureRequest) -> None:
    row = next(LeRobotDataset(request.getfixturevalue(form)).rows())
    for array in (row.state, row.action, *row.images.values()):
        assert array.flags.writeable
        assert array.flags.c_contiguous


@ALL_FORMS
@pytest.mark.parametrize("stride", [1, 2, 3, 10])
@pytest.mark.parametrize("episodes", [None, (1,), (2, 0), ()])
def test_stride_and_episodes_select_from_all_rows(
    form: str, stride: int, episodes: tuple[int, ...] | None, request: pytest.FixtureRequest
) -> None:
    dataset = LeRobotDataset(request.getfixturevalue(form))
    expected = [
        row for row in dataset.rows() if row.frame % stride == 0 and (episodes is None or row.episode in episodes)
    ]
    got = list(dataset.rows(episodes=episodes, stride=stride))
    assert [row.row for row in got] == [row.row for row in expected]
    for row, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(row.state, other.state)
        for camera in CAMERAS:
            np.testing.assert_array_equal(row.images[camera], other.images[camera])


def test_each_mp4_is_examined_once_and_decoded_once_per_pass(v30: Path, opened: collections.Counter[str]) -> None:
    dataset = LeRobotDataset(v30)
    assert len(list(dataset.rows())) == 16
    assert len(opened) == 2
    assert set(opened.values()) == {2}
    list(dataset.rows(stride=5))
    assert set(opened.values()) == {3}


def test_no_video_is_decoded_when_images_are_off(
    v30: Path, v30_pictures: Path, opened: collections.Counter[str]
) -> None:
    for root in (v30, v30_pictures):
        rows = list(LeRobotDataset(root).rows(images=False))
        assert [dict(row.images) for row in rows] == [{}] * 16
    assert not opened


def test_a_video_without_wanted_episodes_is_not_opened(tmp_path: Path, opened: collections.Counter[str]) -> None:
    # An encoder buffers frames before it writes any, so only a longer episode can fill a file.
    root = write_v30(tmp_path / "set", record((50, 60, 50)), video_files_size_in_mb=1e-6)
    opened.clear()
    rows = list(LeRobotDataset(root).rows(episodes=[1]))
    assert [row.frame for row in rows] == list(range(60))
    assert sorted(opened) == [f"observation.images.{camera}/chunk-000/file-001.mp4" for camera in CAMERAS]


def test_frames_are_decoded_only_when_their_row_is_requested(v30: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # After n rows, exactly n frames of each camera have been decoded.
    decoded = collections.Counter[str]()
    from imagewam_cli.data.lerobot.video import VideoFile

    real = VideoFile.next_frame

    def counting(self: VideoFile) -> av.VideoFrame | None:
        decoded[str(self.path)] += 1
        return real(self)

    monkeypatch.setattr(VideoFile, "next_frame", counting)
    rows = LeRobotDataset(v30).rows()
    for expected in range(1, 9):
        next(rows)
        assert set(decoded.values()) == {expected}


def test_closing_the_stream_early_closes_the_videos(v30: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containers: list[Any] = []
    real_open = av.open
    rows = LeRobotDataset(v30).rows()
    monkeypatch.setattr(av, "open", lambda *args: containers.append(real_open(*args)) or containers[-1])
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert len(containers) == 2
    for container in containers:
        with pytest.raises(AssertionError, match="not open"):
            next(container.decode(video=0))


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_the_row_group_size_does_not_change_the_rows(
    copy30: Path, recordings: list[Recording], row_group_size: int
) -> None:
    edit_table(copy30 / DATA, lambda table: table, row_group_size=row_group_size)
    assert_rows_equal(list(LeRobotDataset(copy30).rows(images=False)), recordings)
    rows = list(LeRobotDataset(copy30).rows(images=False, episodes=[1]))
    assert [(row.row, row.frame) for row in rows] == [(5 + i, i) for i in range(7)]


def test_unwanted_row_groups_are_not_read(v30: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = pq.ParquetFile.iter_batches

    def watching(self: Any, **options: Any) -> Any:
        seen.append(options["row_groups"])
        return real(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watching)
    list(LeRobotDataset(v30).rows(images=False, episodes=[1]))
    assert seen == [[1]]


def test_episodes_longer_than_a_batch_are_joined(
    v30: Path, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 2)
    assert_rows_equal(list(LeRobotDataset(v30).rows(images=False)), recordings)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 3)])
def test_vectors_are_read_from_any_arrow_list_type(
    copy30: Path, recordings: list[Recording], kind: pa.DataType
) -> None:
    def recast(table: pa.Table) -> pa.Table:
        column = pa.array(table["observation.state"].to_pylist(), kind)
        return table.set_column(0, pa.field("observation.state", kind), column)

    edit_table(copy30 / DATA, recast)
    assert_rows_equal(list(LeRobotDataset(copy30).rows(images=False)), recordings)


def test_float64_and_integer_columns_keep_every_digit(copy30: Path) -> None:
    # A position in UTM coordinates: float32 has steps of half a meter there.
    states = [[4_500_000.001 + 0.001 * i, 0.1, 16_777_217.0] for i in range(sum(LENGTHS))]
    counts = [[16_777_217 + i, -i] for i in range(sum(LENGTHS))]

    def edit(table: pa.Table) -> pa.Table:
        table = table.drop(["observation.state", "action"])
        table = table.append_column("observation.state", pa.array(states, pa.list_(pa.float64())))
        return table.append_column("action", pa.array(counts, pa.list_(pa.int64())))

    edit_table(copy30 / DATA, edit)
    rows = list(LeRobotDataset(copy30).rows(images=False))
    assert [row.state.tolist() for row in rows] == states
    assert [row.action.tolist() for row in rows] == counts


def test_a_vector_of_length_one_is_read_from_a_scalar_column(copy30: Path) -> None:
    edit_json(
        copy30 / "meta/info.json",
        lambda info: info["features"].update({"grip": {"dtype": "float32", "shape": [1], "names": ["grip"]}}),
    )
    edit_table(copy30 / DATA, lambda table: table.append_column("grip", pa.array(range(16), pa.float32())))
    rows = list(LeRobotDataset(copy30, KeyMap(state="grip")).rows(images=False))
    assert [row.state.tolist() for row in rows] == [[float(i)] for i in range(16)]


def test_images_stored_beside_the_data_file_are_found(v30_pictures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(v30_pictures, tmp_path / "set"))
    expected = [row.images["top"] for row in LeRobotDataset(root).rows()]

    def take_out(table: pa.Table) -> pa.Table:
        cells = table[TOP].to_pylist()
        for number, cell in enumerate(cells):
            (root / f"{number}.png").write_bytes(cell["bytes"])
        return set_column(table, TOP, [{"bytes": None, "path": f"{i}.png"} for i in range(len(cells))])

    edit_table(root / DATA, take_out)
    for row, pixels in zip(LeRobotDataset(root).rows(), expected, strict=True):
        np.testing.assert_array_equal(row.images["top"], pixels)


def test_an_instruction_may_change_within_an_episode(copy30: Path) -> None:
    edit_table(copy30 / DATA, lambda t: set_column(t, "task_index", [0, 0, 1, 1, 1] + [0] * 11))
    rows = itertools.islice(LeRobotDataset(copy30).rows(images=False), 5)
    assert [row.instruction for row in rows] == ["push the red cube"] * 2 + ["open the drawer"] * 3


def test_a_stride_below_one_is_a_usage_error(v30: Path) -> None:
    with pytest.raises(UsageError, match="stride of 0"):
        LeRobotDataset(v30).rows(stride=0)


def test_an_episode_that_does_not_exist_is_named(v30: Path) -> None:
    with pytest.raises(DatasetError, match="has no episode 7") as caught:
        LeRobotDataset(v30).rows(episodes=[0, 7])
    assert caught.value.hint == "it has 3 episodes, 0 .. 2"


class TestBrokenFiles:
    """Errors name the damaged file and the episode."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (DATA, r"file-000\.parquet, episodes 0-2: the file is missing"),
            (TOP_MP4, r"images\.top/chunk-000/file-000\.mp4, episodes 0-2: the file is missing"),
        ],
    )
    def test_a_missing_file_is_reported_before_the_first_row(self, copy30: Path, name: str, message: str) -> None:
        (copy30 / name).unlink()
        dataset = LeRobotDataset(copy30)
        with pytest.raises(DatasetError, match=message):
            dataset.rows()

    def test_a_missing_v21_video_names_its_episode(self, v21: Path, tmp_path: Path) -> None:
        root = Path(shutil.copytree(v21, tmp_path / "v21"))
        (root / f"videos/chunk-000/{TOP}/episode_000001.mp4").unlink()
        with pytest.raises(DatasetError, match=r"episode_000001\.mp4, episode 1: the file is missing"):
            LeRobotDataset(root).rows()
        assert len(list(LeRobotDataset(root).rows(episodes=[0, 2]))) == 9
        assert len(list(LeRobotDataset(root).rows(images=False))) == 16

    @pytest.mark.parametrize("frames", [6, 8])
    def test_a_video_of_the_wrong_length_is_refused(self, tmp_path: Path, frames: int) -> None:
        recordings = record()
        root = write_v21(tmp_path / "v21", recordings)
        pixels = np.resize(recordings[1].frames["top"], (frames, 32, 48, 3))
        encode_mp4(root / f"videos/chunk-000/{TOP}/episode_000001.mp4", pixels)
        message = rf"episode_000001\.mp4, episode 1: the video has {frames} frames for the 7 rows of the episode"
        with pytest.raises(DatasetError, match=message) as caught:
            LeRobotDataset(root).rows()
        assert caught.value.hint == "leave out what cannot be read: --exclude-episodes 1"

    def test_a_v30_video_that_lacks_a_frame_names_the_last_episode(
        self, copy30: Path, recordings: list[Recording]
    ) -> None:
        pixels = np.concatenate([recording.frames["top"] for recording in recordings])
        encode_mp4(copy30 / TOP_MP4, pixels[:-1])
        with (
            pytest.warns(ImagewamWarning, match="is 1 frames shorter than its episodes"),
            pytest.raises(DatasetError, match=r"file-000\.mp4, episode 2: the video has 15 frames, but .* 12 \.\. 15"),
        ):
            LeRobotDataset(copy30).rows()

    def test_a_truncated_video_is_refused(self, copy30: Path) -> None:
        path = copy30 / TOP_MP4
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DatasetError, match=r"file-000\.mp4, episodes 0-2: the file is an mp4 without its index"):
            LeRobotDataset(copy30).rows()

    def test_a_truncated_data_file_is_refused(self, copy30: Path) -> None:
        path = copy30 / DATA
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DatasetError, match=r"file-000\.parquet, episodes 0-2: the file is a parquet file without"):
            LeRobotDataset(copy30).rows(images=False)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.slice(0, 15), "episode 2 has 3 rows, but the episode table gives length 4"),
            (lambda t: t.slice(0, 12), r"file-000\.parquet, episode 2: no data file has rows of the episode"),
            (
                lambda t: pa.concat_tables([t.slice(0, 5), t.slice(12), t.slice(5, 7)]),
                "has rows of episode 2 where those of episode 1",
            ),
            (
                lambda t: pa.concat_tables([t, t.slice(15)]),
                "episode 2 has 5 rows, but .* gives length 4",
            ),
            (lambda t: t.drop_columns(["action"]), r"\(episode 0\) has no column 'action'"),
            (
                lambda t: set_column(t, "frame_index", [0, 1, 3, 4, 5, *t["frame_index"].to_pylist()[5:]]),
                "episode 0: frame_index is not 0 .. 4",
            ),
            (
                lambda t: set_column(t, "task_index", [0] * 5 + [8] * 11),
                "episode 1: task_index 8 is not among the 2 tasks",
            ),
            (lambda t: set_column(t, "task_index", [0] * 15 + [None]), "episode 2: 'task_index' has 1 empty values"),
        ],
    )
    def test_inconsistent_rows_are_refused(
        self, copy30: Path, edit: Callable[[pa.Table], pa.Table], message: str
    ) -> None:
        edit_table(copy30 / DATA, edit)
        with pytest.raises(DatasetError, match=message):
            list(LeRobotDataset(copy30).rows(images=False))

    @pytest.mark.parametrize(
        ("key", "bad", "message"),
        [
            ("action", [float("nan"), 0.0], "episode 1: 'action' is not finite in frame 2"),
            ("action", [0.0, float("inf")], "episode 1: 'action' is not finite in frame 2"),
            ("observation.state", None, "episode 1: 'observation.state' has 1 empty values"),
        ],
    )
    def test_missing_and_non_finite_numbers_are_refused(
        self, copy30: Path, key: str, bad: list[float] | None, message: str
    ) -> None:
        def spoil(table: pa.Table) -> pa.Table:
            values = table[key].to_pylist()
            values[5 + 2] = bad
            return set_column(table, key, values)

        edit_table(copy30 / DATA, spoil)
        rows = LeRobotDataset(copy30).rows(images=False)
        assert [next(rows).row for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(DatasetError, match=message):
            next(rows)

    def test_vectors_of_the_wrong_size_are_refused(self, copy30: Path) -> None:
        edit_json(copy30 / "meta/info.json", lambda info: info["features"]["action"].update(shape=[4]))
        with pytest.raises(DatasetError, match=r"'action' has vectors of \[2\] numbers, but meta/info.json declares 4"):
            list(LeRobotDataset(copy30).rows(images=False))

    def test_frames_of_the_wrong_size_are_refused(self, copy30: Path) -> None:
        edit_json(copy30 / "meta/info.json", lambda info: info["features"][TOP].update(shape=[64, 64, 3]))
        with pytest.raises(DatasetError, match=r"episode 0: frames are 32x48 .* meta/info\.json declares 64x64"):
            list(LeRobotDataset(copy30).rows())

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            (None, "episode 1, frame 2: 'observation.images.top' has no picture"),
            (
                {"bytes": b"no picture", "path": None},
                "frame 2: the picture of 'observation.images.top' cannot be decoded",
            ),
            ({"bytes": None, "path": "gone.png"}, r"frame 2: the picture file .*gone\.png cannot be read"),
        ],
    )
    def test_damaged_images_are_refused(
        self, v30_pictures: Path, tmp_path: Path, cell: dict[str, Any] | None, message: str
    ) -> None:
        root = Path(shutil.copytree(v30_pictures, tmp_path / "set"))

        def spoil(table: pa.Table) -> pa.Table:
            cells = table[TOP].to_pylist()
            cells[5 + 2] = cell
            return set_column(table, TOP, cells)

        edit_table(root / DATA, spoil)
        with pytest.raises(DatasetError, match=message):
            list(LeRobotDataset(root).rows())

    def test_images_of_the_wrong_size_are_refused(self, v30_pictures: Path, tmp_path: Path) -> None:
        root = Path(shutil.copytree(v30_pictures, tmp_path / "set"))
        edit_json(root / "meta/info.json", lambda info: info["features"][TOP].update(shape=[48, 32, 3]))
        with pytest.raises(DatasetError, match=r"is 32x48 .* meta/info\.json declares 48x32"):
            list(LeRobotDataset(root).rows())


def test_the_expected_lengths_are_those_of_the_fixture() -> None:
    # The expected values above assume these lengths.
    assert LENGTHS == (5, 7, 4)


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "is missing"), ("", "is empty"), ("  ", "is empty")], ids=["null", "empty", "blank"]
)
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_an_instruction_that_says_nothing_is_refused_where_a_frame_needs_it(
    request: pytest.FixtureRequest, tmp_path: Path, version: str, text: str | None, problem: str
) -> None:
    root = Path(shutil.copytree(request.getfixturevalue(version), tmp_path / "edited"))
    if version == "v30":
        edit_table(root / "meta/tasks.parquet", lambda t: set_column(t, "task", ["push the red cube", text]))
    else:
        tasks = [{"task_index": 0, "task": "push the red cube"}, {"task_index": 1, "task": text}]
        (root / "meta/tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    dataset = LeRobotDataset(root)
    with pytest.raises(DatasetError, match=rf"episode 1, task 1: the instruction {problem}") as caught:
        list(dataset.rows(images=False))
    assert caught.value.hint is not None
    assert "--instruction-key" in caught.value.hint
    assert len(list(dataset.rows(episodes=[0], images=False))) == 5

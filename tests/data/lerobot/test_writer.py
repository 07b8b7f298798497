"""Test the LeRobot writer: its files, read back with pyarrow and PyAV, and that a failure leaves no files.

Expected names, types and keys are those of datasets written by lerobot 0.6.1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.lerobot.encoder import CameraEncoder
from imagewam_cli.data.lerobot.reader import LeRobotDataset
from imagewam_cli.data.lerobot.writer import LeRobotWriter
from imagewam_cli.errors import DatasetError, UsageError
from tests.support.recordings import (
    ACTION_NAMES,
    CAMERAS,
    FPS,
    LENGTHS,
    STATE_NAMES,
    Recording,
    decode_mp4,
    encode_mp4,
    record,
    write_v30,
)

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
TOP = "observation.images.top"
WRIST = "observation.images.wrist"
BOOKKEEPING = ["timestamp", "frame_index", "episode_index", "index", "task_index"]


def open_writer(root: Path, **changes: Any) -> LeRobotWriter:
    options: dict[str, Any] = {
        "fps": FPS,
        "robot_type": "testbot",
        "cameras": CAMERAS,
        "state_names": STATE_NAMES,
        "action_names": ACTION_NAMES,
    }
    return LeRobotWriter(root, **(options | changes))


def add(writer: LeRobotWriter, recording: Recording, **changes: Any) -> int:
    return writer.add_episode(**(vars(recording) | changes))


def merge_like_lerobot(files: Sequence[Path], merged: Path) -> Path:
    """Append mp4s without decoding, by FFmpeg's concat demuxer, whose packets go to the muxer as they are."""
    listed = merged.with_suffix(".txt")
    listed.write_text("ffconcat version 1.0\n" + "".join(f"file '{file}'\n" for file in files))
    with (
        av.open(str(listed), format="concat", options={"safe": "0"}) as source,
        av.open(str(merged), "w") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.time_base = source.streams.video[0].time_base
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return merged


class TestLayout:
    def test_the_files_are_those_of_a_v30_dataset(self, v30: Path) -> None:
        assert sorted(str(path.relative_to(v30)) for path in v30.rglob("*") if path.is_file()) == [
            DATA,
            EPISODES,
            "meta/info.json",
            "meta/stats.json",
            "meta/tasks.parquet",
            f"videos/{TOP}/chunk-000/file-000.mp4",
            f"videos/{WRIST}/chunk-000/file-000.mp4",
        ]

    def test_info_json(self, v30: Path) -> None:
        info = json.loads((v30 / "meta/info.json").read_text())
        features = info.pop("features")
        assert info == {
            "codebase_version": "v3.0",
            "fps": 10,
            "total_episodes": 3,
            "total_frames": 16,
            "total_tasks": 2,
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "robot_type": "testbot",
            "splits": {"train": "0:3"},
        }
        assert list(features) == [TOP, WRIST, "observation.state", "action", *BOOKKEEPING]
        assert features[TOP]["dtype"] == "video"
        assert features[TOP]["shape"] == [32, 48, 3]
        assert features[TOP]["names"] == ["height", "width", "channels"]
        assert list(features[TOP]["info"]) == [
            "video.height",
            "video.width",
            "video.codec",
            "video.pix_fmt",
            "video.fps",
            "video.channels",
            "has_audio",
            "video.g",
            "video.crf",
            "video.preset",
            "video.fast_decode",
            "video.video_backend",
            "video.extra_options",
            "is_depth_map",
        ]
        assert features["observation.state"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
        assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
        assert features["task_index"] == {"dtype": "int64", "shape": [1], "names": None}

    def test_data_columns_and_their_types(self, v30: Path) -> None:
        schema = pq.read_schema(v30 / DATA)
        assert [(field.name, str(field.type)) for field in schema] == [
            ("observation.state", "fixed_size_list<element: float>[3]"),
            ("action", "fixed_size_list<element: float>[2]"),
            ("timestamp", "float"),
            ("frame_index", "int64"),
            ("episode_index", "int64"),
            ("index", "int64"),
            ("task_index", "int64"),
        ]
        value = {"dtype": "float32", "_type": "Value"}
        declared = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert declared["observation.state"] == {"feature": value, "length": 3, "_type": "List"}
        assert declared["timestamp"] == value
        assert declared["index"] == {"dtype": "int64", "_type": "Value"}
        assert list(declared) == schema.names

    def test_data_rows_equal_the_recording(self, v30: Path, recordings: list[Recording]) -> None:
        table = pq.read_table(v30 / DATA)
        for key, expected in {
            "observation.state": np.concatenate([r.states for r in recordings]),
            "action": np.concatenate([r.actions for r in recordings]),
            "index": np.arange(16),
            "frame_index": np.concatenate([np.arange(length) for length in LENGTHS]),
            "episode_index": np.repeat([0, 1, 2], LENGTHS),
            "task_index": np.repeat([0, 1, 0], LENGTHS),
            "timestamp": np.concatenate([np.arange(length) / FPS for length in LENGTHS]).astype(np.float32),
        }.items():
            np.testing.assert_array_equal(np.array(table[key].to_pylist(), expected.dtype), expected, err_msg=key)

    def test_one_row_group_per_episode(self, v30: Path, v30_pictures: Path) -> None:
        for root in (v30, v30_pictures):
            metadata = pq.read_metadata(root / DATA)
            assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == list(LENGTHS)

    def test_episode_table_locates_each_episode(self, v30: Path) -> None:
        table = pq.read_table(v30 / EPISODES)
        fixed = [name for name in table.column_names if not name.startswith("stats/")]
        videos = [
            f"videos/{key}/{field}"
            for key in (TOP, WRIST)
            for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        ]
        places = ["data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
        own_place = ["meta/episodes/chunk_index", "meta/episodes/file_index"]
        assert fixed == ["episode_index", "tasks", "length", *places, *videos, *own_place]
        rows = table.select(fixed).to_pylist()
        assert [row["length"] for row in rows] == list(LENGTHS)
        assert [row["tasks"] for row in rows] == [["push the red cube"], ["open the drawer"], ["push the red cube"]]
        assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 12), (12, 16)]
        spans = [(row[f"videos/{TOP}/from_timestamp"], row[f"videos/{TOP}/to_timestamp"]) for row in rows]
        assert spans == [(0.0, 0.5), (0.5, 1.2), (1.2, 1.6)]

    def test_episode_statistics_equal_numpy(self, v30: Path, recordings: list[Recording]) -> None:
        schema = pq.read_schema(v30 / EPISODES)
        assert str(schema.field("stats/action/q99").type) == "list<element: double>"
        assert str(schema.field("stats/action/count").type) == "list<element: int64>"
        nested = "list<element: list<element: list<element: double>>>"
        assert str(schema.field(f"stats/{TOP}/mean").type) == nested
        names = ["min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"]
        keys = [TOP, WRIST, "observation.state", "action", *BOOKKEEPING]
        stats = [name for name in schema.names if name.startswith("stats/")]
        assert stats == [f"stats/{key}/{name}" for key in keys for name in names]
        for row, recording in zip(pq.read_table(v30 / EPISODES).to_pylist(), recordings, strict=True):
            np.testing.assert_allclose(row["stats/action/mean"], recording.actions.mean(axis=0), rtol=1e-5)
            assert row[f"stats/{TOP}/count"] == [len(recording.states)]
            expected = recording.frames["top"].mean(axis=(0, 1, 2)) / 255
            np.testing.assert_allclose(np.ravel(row[f"stats/{TOP}/mean"]), expected)

    def test_dataset_statistics_equal_numpy(self, v30: Path, recordings: list[Recording]) -> None:
        stats = json.loads((v30 / "meta/stats.json").read_text())
        assert set(stats) == {TOP, WRIST, "observation.state", "action", *BOOKKEEPING}
        actions = np.concatenate([recording.actions for recording in recordings])
        np.testing.assert_allclose(stats["action"]["q90"], np.quantile(actions, 0.9, axis=0), rtol=1e-6)
        assert stats["index"]["max"] == [15.0]
        assert stats["index"]["count"] == [16]
        assert np.shape(stats[TOP]["std"]) == (3, 1, 1)

    def test_pandas_reads_the_task_column_as_the_index(self, v30: Path) -> None:
        table = pq.read_table(v30 / "meta/tasks.parquet")
        assert table.to_pydict() == {"task_index": [0, 1], "task": ["push the red cube", "open the drawer"]}
        described = json.loads(table.schema.metadata[b"pandas"])
        assert described["index_columns"] == ["task"]
        assert [(column["field_name"], column["pandas_type"]) for column in described["columns"]] == [
            ("task_index", "int64"),
            ("task", "unicode"),
        ]

    @pytest.mark.parametrize(("codec", "name"), [("h264", "h264"), ("av1", "av1")])
    def test_videos_have_the_expected_codec_and_timestamps(
        self, tmp_path: Path, recordings: list[Recording], codec: str, name: str
    ) -> None:
        root = write_v30(tmp_path / "set", recordings, video_codec=codec)
        path = root / f"videos/{TOP}/chunk-000/file-000.mp4"
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.codec_context.codec.canonical_name == name
            assert stream.pix_fmt == "yuv420p"
            assert stream.average_rate == FPS
            # lerobot finds frame i by its timestamp i / fps, with i counted from 0.
            assert [frame.pts * frame.time_base * FPS for frame in frames] == list(range(16))
            keys = [i for i, frame in enumerate(frames) if frame.key_frame]
            assert max(np.diff([*keys, 16])) <= 2
        recorded = np.concatenate([recording.frames["top"] for recording in recordings])
        assert np.abs(decode_mp4(path).astype(int) - recorded).mean() < 4
        info = json.loads((root / "meta/info.json").read_text())["features"][TOP]["info"]
        assert info["video.codec"] == name

    @pytest.mark.parametrize("order", ["ours, theirs", "theirs, ours", "ours, ours, theirs", "theirs, ours, theirs"])
    def test_videos_merge_with_those_of_lerobot_in_any_order(self, tmp_path: Path, order: str) -> None:
        recordings = record((7, 5), {"top": (32, 48)})
        ours = write_v30(tmp_path / "set", recordings) / f"videos/{TOP}/chunk-000/file-000.mp4"
        theirs = tmp_path / "theirs.mp4"
        frames = np.concatenate([recording.frames["top"] for recording in recordings])
        encode_mp4(theirs, frames)  # with libx264's defaults, as lerobot does
        files = [{"ours": ours, "theirs": theirs}[name] for name in order.split(", ")]
        merged = merge_like_lerobot(files, tmp_path / "merged.mp4")
        np.testing.assert_array_equal(decode_mp4(merged), np.concatenate([decode_mp4(file) for file in files]))
        with av.open(str(merged)) as container:
            stamps = [frame.pts * frame.time_base * FPS for frame in container.decode(video=0)]
        assert stamps == list(range(12 * len(files)))

    def test_images_are_stored_without_loss(self, v30_pictures: Path, recordings: list[Recording]) -> None:
        schema = pq.read_schema(v30_pictures / DATA)
        assert str(schema.field(TOP).type) == "struct<bytes: binary, path: string>"
        assert json.loads(schema.metadata[b"huggingface"])["info"]["features"][TOP] == {"_type": "Image"}
        info = json.loads((v30_pictures / "meta/info.json").read_text())
        assert info["video_path"] is None
        assert info["features"][TOP] == {
            "dtype": "image",
            "shape": [32, 48, 3],
            "names": ["height", "width", "channels"],
        }
        assert not (v30_pictures / "videos").exists()
        cells = pq.read_table(v30_pictures / DATA)[WRIST].to_pylist()
        assert cells[6]["path"] == "frame-000001.png"
        assert cells[6]["bytes"].startswith(b"\x89PNG")
        rows = list(LeRobotDataset(v30_pictures).rows())
        np.testing.assert_array_equal(rows[6].images["wrist"], recordings[1].frames["wrist"][1])

    def test_a_vector_of_length_one_is_a_scalar_column(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        with open_writer(root, cameras={}, state_names=["only"]) as writer:
            writer.add_episode(frames={}, states=[[1], [2]], actions=np.zeros((2, 2)), instruction="wait")
        assert pq.read_schema(root / DATA).field("observation.state").type == pa.float32()
        assert [row.state.tolist() for row in LeRobotDataset(root).rows()] == [[1.0], [2.0]]

    def test_the_folder_has_the_default_permissions(self, v30: Path, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        assert v30.stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestManyFiles:
    def test_full_files_are_continued_in_new_files_and_chunks(self, tmp_path: Path) -> None:
        # An encoder buffers frames before it writes any, so only a longer episode can fill a file.
        recordings = record((50, 60, 50, 55, 3))
        root = write_v30(
            tmp_path / "set", recordings, video_files_size_in_mb=1e-6, data_files_size_in_mb=1e-6, chunks_size=2
        )
        places = ["000/file-000", "000/file-001", "001/file-000", "001/file-001", "002/file-000"]
        assert sorted(str(p.relative_to(root)) for p in (root / "data").rglob("*.parquet")) == [
            f"data/chunk-{place}.parquet" for place in places
        ]
        assert sorted(str(p.relative_to(root)) for p in (root / f"videos/{TOP}").rglob("*.mp4")) == [
            f"videos/{TOP}/chunk-{place}.mp4" for place in places
        ]
        rows = pq.read_table(root / EPISODES).to_pylist()
        assert [(r["data/chunk_index"], r["data/file_index"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
        assert {r[f"videos/{TOP}/from_timestamp"] for r in rows} == {0.0}
        back = list(LeRobotDataset(root).rows())
        states = np.concatenate([recording.states for recording in recordings])
        np.testing.assert_array_equal(np.stack([row.state for row in back]), states)
        frames = np.concatenate([recording.frames["top"] for recording in recordings])
        for row, expected in zip(back, frames, strict=True):
            assert np.abs(row.images["top"].astype(int) - expected).mean() < 4

    def test_several_episodes_share_a_file_until_it_is_full(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        root = tmp_path / "set"
        with open_writer(root, cameras={"top": (32, 32)}, video_codec=None, data_files_size_in_mb=0.05) as writer:
            for _ in range(6):
                frames = rng.integers(0, 256, size=(5, 32, 32, 3), dtype=np.uint8)
                writer.add_episode(
                    frames={"top": frames}, states=np.zeros((5, 3)), actions=np.zeros((5, 2)), instruction="noise"
                )
        files = [row["data/file_index"] for row in pq.read_table(root / EPISODES).to_pylist()]
        assert files == [0, 0, 0, 1, 1, 1]
        for path in (root / "data").rglob("*.parquet"):
            # The size limit does not count the footer, as in lerobot.
            assert path.stat().st_size < 1.2 * 0.05 * 1024**2

    def test_many_episodes_are_written_in_groups(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        with open_writer(root, cameras={}) as writer:
            for i in range(103):
                index = writer.add_episode(
                    frames={}, states=np.full((2, 3), i), actions=np.zeros((2, 2)), instruction=f"task {i % 7}"
                )
                assert index == i
        metadata = pq.read_metadata(root / EPISODES)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [100, 3]
        assert len(LeRobotDataset(root).episodes()) == 103
        assert pq.read_table(root / "meta/tasks.parquet").num_rows == 7


class TestNothingHalfWritten:
    """After a failure, neither the dataset nor its temporary folder exists."""

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_error_in_the_block_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        def interrupted() -> None:
            with open_writer(tmp_path / "set") as writer:
                add(writer, record()[0])
                raise error

        with pytest.raises(error):
            interrupted()
        assert os.listdir(tmp_path) == []

    def test_an_error_while_encoding_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CameraEncoder, "add", lambda self, frames: 1 / 0)
        with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "set") as writer:
            add(writer, record()[0])
        assert os.listdir(tmp_path) == []

    def test_an_error_that_the_block_caught_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def swallow() -> None:
            with open_writer(tmp_path / "set") as writer:
                add(writer, record()[0])
                monkeypatch.setattr(CameraEncoder, "add", lambda self, frames: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    add(writer, record()[1])

        with pytest.raises(DatasetError, match=r"episode 1 of .* was not written completely"):
            swallow()
        assert os.listdir(tmp_path) == []

    def test_an_error_while_finishing_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: CameraEncoder) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(CameraEncoder, "close", fail)
        with pytest.raises(OSError, match="disk full"), open_writer(tmp_path / "set") as writer:
            add(writer, record()[0])
        assert os.listdir(tmp_path) == []

    def test_a_dataset_without_an_episode_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no episode was added"), open_writer(tmp_path / "set"):
            pass
        assert os.listdir(tmp_path) == []

    def test_the_target_does_not_exist_before_the_end(self, tmp_path: Path) -> None:
        with open_writer(tmp_path / "set") as writer:
            add(writer, record()[0])
            assert not (tmp_path / "set").exists()
        assert os.listdir(tmp_path) == ["set"]

    def test_a_target_that_appears_while_writing_is_kept(self, tmp_path: Path) -> None:
        def collide() -> None:
            with open_writer(tmp_path / "set") as writer:
                add(writer, record()[0])
                (tmp_path / "set").mkdir()
                (tmp_path / "set/precious").write_text("mine")

        with pytest.raises(UsageError, match="not empty"):
            collide()
        assert os.listdir(tmp_path) == ["set"]
        assert (tmp_path / "set/precious").read_text() == "mine"

    def test_an_encoder_error_names_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: CameraEncoder, pixels: object) -> None:
            raise av.error.InvalidDataError(1, "refused")

        monkeypatch.setattr(CameraEncoder, "_encode", refuse)
        with pytest.raises(DatasetError, match=r"file-000\.mp4: cannot encode 32x48 h264"):  # noqa: SIM117
            with open_writer(tmp_path / "set") as writer:
                add(writer, record()[0])


class TestWrongUsage:
    def test_a_folder_that_is_not_empty_is_refused(self, v30: Path) -> None:
        with pytest.raises(UsageError, match="exists and is not empty"):
            open_writer(v30)

    def test_an_empty_folder_is_accepted(self, tmp_path: Path) -> None:
        with open_writer(tmp_path) as writer:
            add(writer, record()[0])
        assert len(LeRobotDataset(tmp_path).episodes()) == 1

    def test_a_file_at_the_target_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set").write_text("")
        with pytest.raises(UsageError, match="is a file"):
            open_writer(tmp_path / "set")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fps": 0}, "fps is 0"),
            ({"fps": 29.97}, "fps is 29.97"),
            ({"state_names": []}, "state_names are"),
            ({"action_names": ["x", "x"]}, "action_names are"),
            ({"video_codec": "h256"}, "unknown video codec 'h256'"),
            ({"cameras": {"a/b": (32, 32)}}, "camera name 'a/b'"),
            ({"cameras": {"top": (33, 32)}}, "is 33x32 .* cannot be encoded"),
            ({"cameras": {"top": (0, 32)}, "video_codec": None}, "is 0x32"),
        ],
    )
    def test_invalid_arguments_are_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_writer(tmp_path / "set", **changes)
        assert os.listdir(tmp_path) == []

    def test_odd_sizes_are_accepted_for_png_images(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 256, size=(2, 33, 31, 3), dtype=np.uint8)
        with open_writer(tmp_path / "set", cameras={"top": (33, 31)}, video_codec=None) as writer:
            writer.add_episode(
                frames={"top": list(frames)}, states=np.zeros((2, 3)), actions=np.zeros((2, 2)), instruction="look"
            )
        rows = list(LeRobotDataset(tmp_path / "set").rows())
        np.testing.assert_array_equal(np.stack([row.images["top"] for row in rows]), frames)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"states": np.zeros((5, 2))}, r"states have shape \(5, 2\), expected \(L, 3\)"),
            ({"states": np.zeros((0, 3))}, r"states have shape \(0, 3\)"),
            ({"actions": np.zeros((4, 2))}, "has 5 states and 4 actions"),
            ({"actions": np.full((5, 2), np.nan)}, "actions are not finite at step 0"),
            ({"instruction": "  "}, "has no instruction"),
            ({"frames": {"top": np.zeros((5, 32, 48, 3), np.uint8)}}, r"has cameras \['top'\], but the dataset has"),
            (
                {"frames": {"top": np.zeros((4, 32, 48, 3), np.uint8), "wrist": np.zeros((5, 32, 32, 3), np.uint8)}},
                "has 5 states and 4 frames of camera 'top'",
            ),
            (
                {"frames": {"top": np.zeros((5, 48, 32, 3), np.uint8), "wrist": np.zeros((5, 32, 32, 3), np.uint8)}},
                r"camera 'top', frame 0 is uint8 \(48, 32, 3\), expected uint8 \(32, 48, 3\)",
            ),
            (
                {"frames": {"top": np.zeros((5, 32, 48, 3)), "wrist": np.zeros((5, 32, 32, 3), np.uint8)}},
                "frame 0 is float64",
            ),
        ],
    )
    def test_invalid_episodes_are_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        # A refused episode leaves no rows, so the next episode gets its index.
        with open_writer(tmp_path / "set") as writer:
            with pytest.raises(UsageError, match=message):
                add(writer, record()[0], **changes)
            add(writer, record()[1])
        assert [episode.length for episode in LeRobotDataset(tmp_path / "set").episodes()] == [7]

    def test_use_outside_a_with_block_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="the writer is not open"):
            add(open_writer(tmp_path / "set"), record()[0])

    def test_a_finished_writer_cannot_be_reused(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path / "set")
        with writer:
            add(writer, record()[0])
        with pytest.raises(UsageError, match="already open"), writer:
            pass
        with pytest.raises(UsageError, match="not open"):
            add(writer, record()[0])
        assert len(LeRobotDataset(tmp_path / "set").episodes()) == 1

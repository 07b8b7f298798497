"""Test that `open_dataset` detects the version, and that its errors suggest what to do about a wrong path or key."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.errors import DatasetError, ImagewamWarning
from tests.support.recordings import ACTION_NAMES, CAMERAS, FPS, LENGTHS, STATE_NAMES, edit_json, record, write_v30


@pytest.mark.parametrize(
    ("fixture", "name"), [("v30", "lerobot-v3.0"), ("v30_pictures", "lerobot-v3.0"), ("v21", "lerobot-v2.1")]
)
def test_the_version_is_detected(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(fixture)
    dataset = open_dataset(str(root))
    info = dataset.info
    assert (info.root, info.format, info.fps, info.robot_type) == (root, name, FPS, "testbot")
    assert dict(info.cameras) == dict(CAMERAS)
    assert list(info.cameras) == list(CAMERAS)
    assert info.state_names == STATE_NAMES
    assert (info.state_dim, info.action_dim) == (3, 2)
    assert (info.total_episodes, info.total_rows) == (3, sum(LENGTHS))
    assert [(e.index, e.length, e.first_row) for e in dataset.episodes()] == [(0, 5, 0), (1, 7, 5), (2, 4, 12)]


def test_dimensions_without_names_are_numbered(v21: Path, v30: Path) -> None:
    assert open_dataset(v30).info.action_names == ACTION_NAMES
    assert open_dataset(v21).info.action_names == ("action_0", "action_1")


def test_importing_the_package_loads_no_reader() -> None:
    code = (
        "import sys, imagewam_cli.data.formats, imagewam_cli.data.lerobot;"
        "print([m for m in ('pyarrow', 'av', 'PIL', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class TestWrongPaths:
    def test_a_missing_path_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="nowhere does not exist"):
            open_dataset(tmp_path / "nowhere")

    def test_a_file_is_refused(self, v30: Path) -> None:
        with pytest.raises(DatasetError, match="is a file, not a folder"):
            open_dataset(v30 / "meta/info.json")

    def test_a_folder_without_info_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"has no meta/info\.json: it is not a LeRobot dataset"):
            open_dataset(tmp_path)

    def test_a_dataset_one_folder_deeper_is_suggested(self, v30: Path) -> None:
        with pytest.raises(DatasetError) as caught:
            open_dataset(v30.parent)
        assert caught.value.hint == f"did you mean {str(v30)!r}?"


class TestWrongInfo:
    @pytest.fixture
    def info(self, v30: Path, tmp_path: Path) -> Path:
        shutil.copytree(v30, tmp_path / "set")
        return tmp_path / "set/meta/info.json"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"codebase_version": "v1.6"}, "'v1.6' is not supported; supported: v2.0, v2.1, v3.0"),
            ({"codebase_version": "v2.1"}, "declares codebase_version v2.1, but .* layout of v3"),
            ({"codebase_version": "latest"}, "'latest' is not supported"),
            ({"total_episodes": 3.5}, "'total_episodes' is 3.5"),
            ({"total_frames": True}, "'total_frames' is True"),
            ({"fps": 0}, "fps is 0.0"),
            ({"fps": "ten"}, "'fps' is 'ten'"),
            ({"fps": float("inf")}, "fps is inf"),
            ({"fps": float("nan")}, "fps is nan"),
            ({"chunks_size": 0}, "chunks_size is 0"),
            ({"data_path": "data/{nothing}.parquet"}, "cannot fill in 'data_path' template"),
            ({"features": {"action": 3}}, "feature 'action' is 3"),
            ({"features": {"action": {"dtype": "float32"}}}, "has no 'shape'"),
        ],
    )
    def test_a_wrong_value_is_named(self, info: Path, change: dict[str, Any], message: str) -> None:
        edit_json(info, lambda content: content.update(change))
        with pytest.raises(DatasetError, match=message):
            open_dataset(info.parent.parent)

    @pytest.mark.parametrize("key", ["codebase_version", "fps", "features"])
    def test_a_missing_key_is_named(self, info: Path, key: str) -> None:
        edit_json(info, lambda content: content.pop(key))
        with pytest.raises(DatasetError, match=f"info.json has no '{key}'"):
            open_dataset(info.parent.parent)

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_text_that_is_not_json_is_refused(self, info: Path, text: str) -> None:
        info.write_text(text)
        with pytest.raises(DatasetError, match="JSON"):
            open_dataset(info.parent.parent)

    def test_a_dataset_without_episodes_is_refused(self, v21: Path, tmp_path: Path) -> None:
        root = tmp_path / "empty"
        shutil.copytree(v21, root)
        (root / "meta/episodes.jsonl").write_text("")
        edit_json(root / "meta/info.json", lambda content: content.update(total_episodes=0, total_frames=0))
        with pytest.raises(DatasetError, match="has no episodes"):
            open_dataset(root)


class TestUnusualInfo:
    """What has only one meaning is read, with a warning where a person should know."""

    @pytest.fixture(params=["v30", "v21"])
    def info(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        shutil.copytree(request.getfixturevalue(request.param), tmp_path / "set")
        return tmp_path / "set/meta/info.json"

    @pytest.mark.parametrize(
        "change",
        [
            {"fps": "10"},
            {"fps": 10.0},
            {"total_episodes": 3.0, "total_frames": "16"},
            {"total_episodes": None, "total_frames": None},
            {"data_path": None, "video_path": None},
            {"robot_type": ["left arm", "right arm"]},
            {"robot_type": None},
        ],
    )
    def test_harmless_values_are_read_without_a_word(
        self, info: Path, change: dict[str, Any], recwarn: pytest.WarningsRecorder
    ) -> None:
        if "data_path" in change and "v2.1" in info.read_text():
            change = change | {"chunks_size": 2}  # of the fixture
        edit_json(info, lambda content: content.update(change))
        dataset = open_dataset(info.parent.parent)
        assert (dataset.info.fps, dataset.info.total_episodes, dataset.info.total_rows) == (10, 3, 16)
        assert len(list(dataset.rows())) == 16
        assert not recwarn.list

    def test_two_robots_are_both_named(self, info: Path) -> None:
        edit_json(info, lambda content: content.update(robot_type=["a", "b"]))
        assert open_dataset(info.parent.parent).info.robot_type == "a, b"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"total_episodes": 4}, "declares total_episodes 4, but the table has 3"),
            ({"total_frames": 99}, "declares total_frames 99, but the table has 16"),
        ],
    )
    def test_totals_that_lie_are_named_and_the_table_is_read(
        self, info: Path, change: dict[str, Any], message: str
    ) -> None:
        edit_json(info, lambda content: content.update(change))
        with pytest.warns(ImagewamWarning, match=message):
            dataset = open_dataset(info.parent.parent)
        assert (dataset.info.total_episodes, dataset.info.total_rows) == (3, 16)

    def test_a_null_feature_is_ignored_aloud(self, info: Path) -> None:
        edit_json(info, lambda content: content["features"].update(left_over=None))
        with pytest.warns(ImagewamWarning, match="feature 'left_over' is null and therefore ignored"):
            assert len(list(open_dataset(info.parent.parent).rows())) == 16

    @pytest.mark.parametrize("spelling", ["{}", "v{}", "V{}", " v{}", "v{}.0"])
    def test_versions_may_be_spelled_without_v(self, info: Path, spelling: str) -> None:
        number = "3.0" if "v3.0" in info.read_text() else "2.1"
        edit_json(info, lambda content: content.update(codebase_version=spelling.format(number)))
        assert open_dataset(info.parent.parent).info.format == f"lerobot-v{number}"

    @pytest.mark.parametrize("minor", ["3.1", "v3.7"])
    def test_a_newer_minor_version_is_read_with_a_warning(self, v30: Path, tmp_path: Path, minor: str) -> None:
        root = Path(shutil.copytree(v30, tmp_path / "set"))
        edit_json(root / "meta/info.json", lambda content: content.update(codebase_version=minor))
        with pytest.warns(ImagewamWarning, match="is newer than this reader; the dataset is read as v3.0"):
            assert len(list(open_dataset(root).rows())) == 16

    def test_v20_is_read_with_its_own_statistics_in_the_identity(self, v21: Path, tmp_path: Path) -> None:
        root = Path(shutil.copytree(v21, tmp_path / "set"))
        edit_json(root / "meta/info.json", lambda content: content.update(codebase_version="v2.0"))
        (root / "meta/stats.json").write_text("{}")
        dataset = open_dataset(root)
        assert dataset.info.format == "lerobot-v2.0"
        for row, other in zip(dataset.rows(), open_dataset(v21).rows(), strict=True):
            np.testing.assert_array_equal(row.images["top"], other.images["top"])
            np.testing.assert_array_equal(row.state, other.state)
        (root / "meta/stats.json").write_text('{"action": {}}')
        assert open_dataset(root).info.identity != dataset.info.identity


class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "message", "hint"),
        [
            (
                KeyMap(state="observation.stat"),
                "has no feature 'observation.stat' for the state; it has: observation.state, action, timestamp",
                "did you mean 'observation.state'? (pass it with --state-key)",
            ),
            (
                KeyMap(action="actions"),
                "has no feature 'actions' for the action",
                "did you mean 'action'? (pass it with --action-key)",
            ),
            (
                KeyMap(cameras=("topp",)),
                "has no camera 'topp'; it has: top, wrist",
                "did you mean 'top'? (pass it with --camera)",
            ),
            (KeyMap(cameras=("zzz",)), "has no camera 'zzz'", "choose one of: top, wrist (pass it with --camera)"),
            (KeyMap(state="observation.images.top"), "stores no numbers under 'observation.images.top'", None),
        ],
    )
    def test_a_wrong_key_lists_the_existing_keys(self, v30: Path, keys: KeyMap, message: str, hint: str | None) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            open_dataset(v30, keys)
        if hint is not None:
            assert caught.value.hint == hint

    @pytest.mark.parametrize("camera", ["wrist", "observation.images.wrist"])
    def test_a_camera_can_be_chosen_by_short_or_full_name(self, v30: Path, camera: str) -> None:
        dataset = open_dataset(v30, KeyMap(cameras=(camera,)))
        assert dict(dataset.info.cameras) == {"wrist": CAMERAS["wrist"]}
        assert next(dataset.rows()).images.keys() == {"wrist"}

    def test_cameras_are_returned_in_the_requested_order(self, v30: Path) -> None:
        dataset = open_dataset(v30, KeyMap(cameras=("wrist", "top")))
        assert list(dataset.info.cameras) == list(next(dataset.rows()).images) == ["wrist", "top"]

    def test_other_features_can_serve_as_state_and_action(self, v30: Path) -> None:
        dataset = open_dataset(v30, KeyMap(state="timestamp", action="observation.state"))
        rows = list(dataset.rows(images=False))
        assert dataset.info.state_names == ("timestamp_0",)
        assert rows[1].state.tolist() == [pytest.approx(0.1)]
        assert rows[1].action.shape == (3,)

    def test_a_bare_image_feature_is_called_image(self, tmp_path: Path) -> None:
        root = write_v30(tmp_path / "set", record((3,), {"top": (32, 32)}), video_codec=None)

        def rename(content: dict[str, Any]) -> None:
            content["features"]["observation.image"] = content["features"].pop("observation.images.top")

        edit_json(root / "meta/info.json", rename)
        assert list(open_dataset(root).info.cameras) == ["image"]

    def test_depth_maps_are_not_cameras(self, v30: Path, tmp_path: Path) -> None:
        root = tmp_path / "set"
        shutil.copytree(v30, root)

        def to_depth(content: dict[str, Any]) -> None:
            content["features"]["observation.images.wrist"]["info"]["is_depth_map"] = True

        edit_json(root / "meta/info.json", to_depth)
        with pytest.warns(ImagewamWarning, match="left out: 'wrist'"):
            assert list(open_dataset(root).info.cameras) == ["top"]

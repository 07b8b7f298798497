"""`data.lerobot.keys`: which columns become state, action and instruction, and how their values are put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.episodes import EpisodeSelection
from imagewam_cli.data.formats import check_pictures, open_dataset
from imagewam_cli.data.types import NO_STATE, KeyMap, Row
from imagewam_cli.errors import DatasetError, UsageError
from tests.support.feature_sets import LENGTHS, Column, vectors, write_features

TOTAL = sum(LENGTHS)
SPLIT = {
    "states.joint": Column(shape=[3], names=["a", "b", "c"]),
    "states.gripper": Column(shape=[1]),
    "actions.joint": Column(shape=[2], names=["x", "y"]),
    "actions.head": Column(shape=[2], names=["y", "z"]),
}


def rows_of(root: Path, keys: KeyMap) -> list[Row]:
    return list(open_dataset(root, keys).rows(images=False))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State and action spread over several features."""
    return write_features(tmp_path_factory.mktemp("split") / "set", SPLIT)


class TestSeveralFeatures:
    def test_values_stand_side_by_side_in_the_listed_order(self, split: Path) -> None:
        keys = KeyMap(state="states.gripper, states.joint", action="actions.joint,actions.head")
        rows = rows_of(split, keys)
        state = np.concatenate([vectors("states.gripper", [1], TOTAL), vectors("states.joint", [3], TOTAL)], axis=1)
        action = np.concatenate([vectors("actions.joint", [2], TOTAL), vectors("actions.head", [2], TOTAL)], axis=1)
        np.testing.assert_array_equal(np.stack([row.state for row in rows]), state)
        np.testing.assert_array_equal(np.stack([row.action for row in rows]), action)
        assert all(row.state.dtype == row.action.dtype == np.float32 for row in rows)

    def test_names_are_kept_and_get_their_key_where_two_are_equal(self, split: Path) -> None:
        info = open_dataset(
            split, KeyMap(state="states.joint,states.gripper", action="actions.joint,actions.head")
        ).info
        assert info.state_names == ("a", "b", "c", "states.gripper_0")
        assert info.action_names == ("actions.joint.x", "actions.joint.y", "actions.head.y", "actions.head.z")

    def test_a_single_feature_keeps_its_names(self, split: Path) -> None:
        info = open_dataset(split, KeyMap(state="states.joint", action="actions.head")).info
        assert (info.state_names, info.action_names) == (("a", "b", "c"), ("y", "z"))

    @pytest.mark.parametrize(
        ("keys", "error", "message"),
        [
            (KeyMap(state="states.joint,states.joint", action="actions.head"), UsageError, "'states.joint' twice"),
            (KeyMap(state="states.joint,nothing", action="actions.head"), DatasetError, "no feature 'nothing' for the"),
            (KeyMap(state="states.joint,", action="actions.head"), DatasetError, "no feature '' for the state"),
            (KeyMap(state="states.joint,actions.head", action="actions.head"), UsageError, "both the state and the"),
            (KeyMap(state="actions.head", action="actions.head"), UsageError, "both the state and the action"),
        ],
    )
    def test_a_wrong_list_is_refused(self, split: Path, keys: KeyMap, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            open_dataset(split, keys)


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "names", "expected"),
        [
            ([], None, ["v_0"]),
            ([1], ["grip"], ["grip"]),
            ([1, 3], None, ["v_0", "v_1", "v_2"]),
            ([1, 3], ["x", "y", "z"], ["x", "y", "z"]),
            ([2, 3], None, ["v_0_0", "v_0_1", "v_0_2", "v_1_0", "v_1_1", "v_1_2"]),
            ([2, 2], {"motors": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
        ],
    )
    def test_any_shape_is_read_row_by_row(
        self, tmp_path: Path, shape: list[int], names: object, expected: list[str]
    ) -> None:
        root = write_features(tmp_path / "set", {"v": Column(shape=shape, names=names), "action": Column(shape=[2])})
        dataset = open_dataset(root, KeyMap(state="v"))
        assert list(dataset.info.state_names) == expected
        states = np.stack([row.state for row in dataset.rows(images=False)])
        np.testing.assert_array_equal(states, vectors("v", shape, TOTAL))

    def test_a_feature_without_numbers_is_refused(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"v": Column(shape=[0]), "action": Column(shape=[2])})
        with pytest.raises(DatasetError, match=r"'v' .* has shape \[0\], so the state would have no number"):
            open_dataset(root, KeyMap(state="v"))

    def test_a_set_without_a_state_has_states_of_no_dimension(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"action": Column(shape=[2])})
        dataset = open_dataset(root, KeyMap(state=NO_STATE))
        assert dataset.info.state_names == ()
        assert {row.state.shape for row in dataset.rows(images=False)} == {(0,)}


TASKS = ("EnvironmentName", "pick the cup", "valid")


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task is the name of an environment; the sentence is in other columns."""
    columns = {
        "observation.state": Column(shape=[2]),
        "action": Column(shape=[2]),
        "annotation.task": Column(dtype="int64", values=[1] * 6 + [2] * (TOTAL - 6)),
        "annotation.other": Column(dtype="int64", values=[7] * TOTAL),
        "language": Column(dtype="string", values=[f"move {row}" for row in range(TOTAL)]),
        "note": Column(dtype="float32"),
    }
    return write_features(tmp_path_factory.mktemp("annotated") / "set", columns, tasks=TASKS)


class TestInstructions:
    def test_an_integer_column_is_an_index_into_the_tasks(self, annotated: Path) -> None:
        rows = rows_of(annotated, KeyMap(instruction="annotation.task"))
        assert [row.instruction for row in rows] == ["pick the cup"] * 6 + ["valid"] * (TOTAL - 6)

    def test_a_text_column_is_the_instruction_of_each_frame(self, annotated: Path) -> None:
        rows = rows_of(annotated, KeyMap(instruction="language"))
        assert [row.instruction for row in rows] == [f"move {row}" for row in range(TOTAL)]

    def test_without_a_key_the_task_of_each_frame_is_the_instruction(self, annotated: Path) -> None:
        rows = rows_of(annotated, KeyMap())
        assert [row.instruction for row in rows if row.frame == 0] == list(TASKS)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (
                "languag",
                "no feature 'languag' for the instruction; it has: .*, language",
            ),
            ("note", "neither a text nor a task number under 'note'"),
            ("observation.state", "neither a text nor a task number under 'observation.state'"),
        ],
    )
    def test_a_wrong_key_lists_the_existing_keys(self, annotated: Path, key: str, message: str) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            open_dataset(annotated, KeyMap(instruction=key))
        assert "--instruction-key" in str(caught.value.hint)

    def test_an_unknown_number_names_the_column_and_the_episode(self, annotated: Path) -> None:
        with pytest.raises(DatasetError, match=r"episode 0: annotation\.other 7 is not among the 3 tasks"):
            rows_of(annotated, KeyMap(instruction="annotation.other"))


class TestMessages:
    """LeRobot's language columns: every frame of an episode has all messages of the episode."""

    MESSAGES = (
        {"style": "subtask", "content": "reach", "timestamp": 0.0},
        {"style": "subtask", "content": "grasp", "timestamp": 0.3},
        {"style": "plan", "content": "reach, then grasp", "timestamp": 0.0},
        {"style": "memory", "content": "seen", "timestamp": 0.2},
        {"style": "task_aug", "content": "take it", "timestamp": 0.0},
        {"style": "task_aug", "content": "get it", "timestamp": 0.0},
    )

    @pytest.fixture
    def told(self, tmp_path: Path) -> Path:
        columns = {
            "observation.state": Column(shape=[2]),
            "action": Column(shape=[2]),
            "language_persistent": Column(dtype="language", values=[self.MESSAGES] * TOTAL),
        }
        return write_features(tmp_path / "set", columns)

    def test_the_newest_message_of_a_style_is_the_instruction(self, told: Path) -> None:
        rows = rows_of(told, KeyMap(instruction="language_persistent/subtask"))
        assert [row.instruction for row in rows] == ["reach" if row.frame < 3 else "grasp" for row in rows]

    @pytest.mark.parametrize(
        ("style", "message"),
        [
            ("memory", "frame 0 has no message of style 'memory'"),
            ("vqa", "frame 0 has no message of style 'vqa' .*: memory, plan, subtask, task_aug"),
            ("task_aug", "frame 0 has 2 messages of style 'task_aug'"),
        ],
    )
    def test_a_style_that_does_not_name_one_message_is_refused(self, told: Path, style: str, message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            rows_of(told, KeyMap(instruction=f"language_persistent/{style}"))

    def test_a_column_of_messages_needs_a_style(self, told: Path) -> None:
        with pytest.raises(DatasetError, match="messages of several styles") as caught:
            open_dataset(told, KeyMap(instruction="language_persistent"))
        assert "--instruction-key language_persistent/subtask" in str(caught.value.hint)


def test_a_text_column_may_be_a_dictionary(tmp_path: Path) -> None:
    root = write_features(tmp_path / "set", {"observation.state": Column(), "action": Column()})
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        texts = pa.array(["go"] * len(table)).dictionary_encode()
        pq.write_table(table.append_column("text", texts), path)
    assert {row.instruction for row in rows_of(root, KeyMap(instruction="text"))} == {"go"}


def test_a_value_that_is_not_a_number_names_the_episode_to_leave_out(tmp_path: Path) -> None:
    states = [[float("nan") if row == 7 else 1.0] for row in range(TOTAL)]
    columns = {"observation.state": Column(values=[s[0] for s in states]), "action": Column(shape=[2])}
    root = write_features(tmp_path / "set", columns)
    with pytest.raises(DatasetError, match=r"episode 1: 'observation\.state' is not finite in frame 1") as caught:
        rows_of(root, KeyMap())
    assert str(caught.value.hint) == "repair the episode, or leave it out: --exclude-episodes 1"
    assert len(list(open_dataset(root, episodes=EpisodeSelection.of(exclude="1")).rows())) == TOTAL - LENGTHS[1]


def test_a_set_without_a_camera_is_refused_where_pictures_are_needed(tmp_path: Path) -> None:
    root = write_features(tmp_path / "set", {"observation.state": Column(), "action": Column()}, cameras={})
    with pytest.raises(DatasetError, match="has no camera: an image editor needs pictures"):
        check_pictures(open_dataset(root))

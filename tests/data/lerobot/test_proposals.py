"""`data.lerobot.proposals`: what the names of features say about their roles, and the hints made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.lerobot.info import Feature
from imagewam_cli.data.lerobot.proposals import Proposal, propose
from imagewam_cli.data.types import NO_STATE, KeyMap
from imagewam_cli.errors import DatasetError, ImagewamWarning, UsageError
from tests.support.feature_sets import Column, write_features


def feature(key: str, dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> Feature:
    return Feature(key=key, dtype=dtype, shape=shape, names=(), is_depth=False)


def proposal(*keys: str) -> Proposal:
    return propose([feature(key) for key in keys])


@pytest.mark.parametrize(
    ("keys", "state", "action"),
    [
        (["observation.state", "action", "observation.velocity"], ["observation.state"], ["action"]),
        (["state", "actions"], ["state"], ["actions"]),
        (["state", "action", "action.raw"], ["state"], ["action"]),
        (["action.left", "action.right", "qpos"], ["qpos"], ["action.left", "action.right"]),
        (["observation.states.a", "observation.states.b", "actions.a"], *2 * [None]),
        (["observation.arm", "extra", "action"], ["observation.arm"], ["action"]),
        (["joint_position", "gripper_position", "actions"], ["joint_position", "gripper_position"], ["actions"]),
        (["actions", "next.reward", "next.done", "timestamp"], [], ["actions"]),
        (["actions", "arm.command", "target_pose"], [], ["actions"]),
        (["observation.action", "observation.qpos"], ["observation.qpos"], ["observation.action"]),
        (["prev_action", "qpos", "action"], ["qpos"], ["action"]),
    ],
)
def test_roles_follow_from_names(keys: list[str], state: list[str] | None, action: list[str] | None) -> None:
    found = proposal(*keys)
    assert list(found.state) == (keys[:2] if state is None else state)
    assert list(found.action) == (keys[2:] if action is None else action)
    assert not set(found.state) & set(found.action)


def test_long_features_without_a_usual_name_are_not_a_state() -> None:
    found = propose([feature("embedding", shape=(768,)), feature("qpos"), feature("action")])
    assert found.state == ("qpos",)


def test_texts_come_before_annotations_and_telling_names_first() -> None:
    features = [
        feature("annotation.human.task", "int64", (1,)),
        feature("annotation.human.validity", "int64", (1,)),
        feature("comment", "string", (1,)),
        feature("language_instruction", "string", (1,)),
        feature("task_index", "int64", (1,)),
        feature("counter", "int64", (1,)),
    ]
    assert propose(features).instruction == ("language_instruction", "comment", "annotation.human.task")


def test_options_can_be_pasted_into_a_shell() -> None:
    found = proposal("observation/arm state", "actions")
    assert found.options(["state", "action"]) == "--state-key 'observation/arm state' --action-key actions"


class TestHints:
    @pytest.mark.parametrize("typed", ["observation.state", "observation.stat", "actio", "actions_"])
    def test_the_action_is_never_proposed_as_the_state(self, tmp_path: Path, typed: str) -> None:
        columns = {"actions": Column(shape=[2]), "actions.raw": Column(shape=[2]), "state": Column(shape=[2])}
        root = write_features(tmp_path / "set", columns)
        with pytest.raises(DatasetError) as caught:
            open_dataset(root, KeyMap(state=typed, action="actions"))
        assert "actions" not in str(caught.value.hint)
        assert "state" in str(caught.value.hint)

    def test_the_chosen_action_is_not_proposed_whatever_it_is_called(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"arm": Column(shape=[2]), "arm2": Column(shape=[2])})
        with pytest.raises(DatasetError) as caught:
            open_dataset(root, KeyMap(state="ar", action="arm"))
        assert str(caught.value.hint) == "did you mean 'arm2'? (pass it with --state-key)"

    def test_an_action_named_as_the_state_is_answered_with_both_keys(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"actions": Column(shape=[2]), "state": Column(shape=[2])})
        with pytest.raises(DatasetError) as caught:
            open_dataset(root, KeyMap(state="actions"))
        assert str(caught.value.hint).startswith("pass --state-key state --action-key actions,")

    def test_one_feature_is_not_both(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"action": Column(shape=[2]), "state": Column(shape=[2])})
        with pytest.raises(UsageError, match="'action' is both the state and the action") as caught:
            open_dataset(root, KeyMap(state="action"))
        assert "--state-key none" in str(caught.value.hint)

    def test_a_set_with_nothing_but_actions_is_read_without_a_state_aloud(self, tmp_path: Path) -> None:
        root = write_features(tmp_path / "set", {"action": Column(shape=[2])})
        with pytest.warns(ImagewamWarning, match="has no state: only pictures and instructions are used"):
            dataset = open_dataset(root)
        assert dataset.info.state_names == ()
        assert dataset.info.keys.state == NO_STATE


def test_columns_that_info_json_does_not_declare_can_be_chosen(tmp_path: Path) -> None:
    columns = {
        "action": Column(shape=[2]),
        "state": Column(shape=[3]),
        "text": Column(dtype="string", values=["a"] * 22),
    }
    root = write_features(tmp_path / "set", columns, undeclared=("state", "text"))
    dataset = open_dataset(root, KeyMap(state="state", instruction="text"))
    assert dataset.info.state_names == ("state_0", "state_1", "state_2")
    assert {row.instruction for row in dataset.rows(images=False)} == {"a"}

"""Test `policy.matching`: numbers and cameras are matched by name, or refused; nothing is read in a wrong order."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.data.types import FloatArray, Observation
from imagewam_cli.errors import ImagewamWarning, RunError, UsageError
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.matching import Interface, camera_names, match, matched_dataset, matched_policy
from tests.support.arithmetic_editor import MemoryDataset

ARM = Interface(
    what="the policy", cameras=("top",), state_names=("x", "y"), action_names=("dx", "dy", "grip"), fps=10.0
)
"""The interface of `MemoryDataset`."""


def renamed(
    *,
    state: Sequence[str] = ("x", "y"),
    action: Sequence[str] = ("dx", "dy", "grip"),
    fps: float = 10.0,
    cameras: Mapping[str, tuple[int, int]] | None = None,
) -> MemoryDataset:
    dataset = MemoryDataset([3, 3])
    dataset.info = dataclasses.replace(
        dataset.info, state_names=tuple(state), action_names=tuple(action), fps=fps, cameras=cameras or {"top": (4, 4)}
    )
    return dataset


class Counting(ChunkPolicy):
    """Plan the state's numbers as the first and second, and 7 as the third; remember the observations."""

    execute = 1

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    @property
    def interface(self) -> Interface:
        return ARM

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        self.seen += observations
        return np.stack([np.array([[*o.state, 7.0]]) for o in observations])


def test_the_same_names_are_read_as_they_are_without_a_word() -> None:
    dataset = renamed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matched_dataset(ARM, dataset) is dataset
        assert matched_dataset(ARM, renamed(fps=10.05)).info.fps == 10.05  # rates such as 29.97 and 30 are equal
        assert matched_dataset(None, renamed(fps=1.0)).info.fps == 1.0


def test_another_order_is_read_by_name() -> None:
    plain, other = renamed(), renamed(state=("y", "x"), action=("grip", "dx", "dy"))
    with pytest.warns(ImagewamWarning) as said:
        dataset = matched_dataset(ARM, other)
    texts = [str(w.message) for w in said]
    assert any("the state has another order and is read by name (the policy: x, y; memory: y, x)" in t for t in texts)
    assert any("the action has another order" in t for t in texts)
    assert dataset.info.action_names == ("dx", "dy", "grip")
    for one, row in zip(plain.rows(), dataset.rows(), strict=True):
        assert row.state.tolist() == one.state[[1, 0]].tolist()
        assert row.action.tolist() == one.action[[1, 2, 0]].tolist()
        assert row.images.keys() == {"top"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"action": ("a", "b", "grip")},
            r"the names of the action's dimensions differ \(the policy: dx, dy, grip; mem",
        ),
        ({"state": ("x", "z")}, r"the names of the state's dimensions differ"),
        ({"state": ("x", "x")}, r"the names of the state's dimensions differ"),
        ({"action": ("dx", "dy", "grip", "dz")}, r"the number of the action's dimensions differs"),
        ({"state": ("x",)}, r"the number of the state's dimensions differs"),
        ({"fps": 30.0}, "the policy plans 10 actions per second, but memory has 30"),
        ({"cameras": {"front": (4, 4)}}, "the policy needs the camera top, which memory lacks; it has: front"),
    ],
)
def test_what_does_not_match_is_refused_with_both_sides(change: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message) as error:
        matched_dataset(ARM, renamed(**change))  # type: ignore[arg-type]
    assert error.value.hint


@pytest.mark.parametrize("numbered", ["action_{}", "motor.{}", "feature[{}]", "{}"])
def test_numbers_that_are_only_counted_are_read_in_their_order_aloud(numbered: str) -> None:
    names = [numbered.format(i) for i in range(3)]
    with pytest.warns(ImagewamWarning, match="the numbers of the action cannot be matched by name"):
        dataset = matched_dataset(ARM, renamed(action=names))
    assert dataset.info.action_names == tuple(names)
    numbered_policy = dataclasses.replace(ARM, action_names=tuple(f"joint_{i}" for i in (1, 2, 3)))
    with pytest.warns(ImagewamWarning, match="cannot be matched by name"):
        matched_dataset(numbered_policy, renamed(action=names))


def test_the_names_and_the_rate_of_a_preset_prove_nothing() -> None:
    imported = dataclasses.replace(ARM, nominal=True)
    with pytest.warns(ImagewamWarning) as said:
        matched_dataset(imported, renamed(action=("a", "b", "c"), fps=20.0))
    assert len(said) == 2
    with pytest.raises(RunError, match="number of the action's"):
        matched_dataset(imported, renamed(action=("a", "b")))


def test_a_policy_without_a_state_reads_any_state() -> None:
    dataset = matched_dataset(dataclasses.replace(ARM, state_names=()), renamed(state=("a", "b")))
    assert [row.state.shape for row in dataset.rows()] == [(0,)] * 6


class TestCameras:
    def test_a_camera_of_another_name_can_stand_for_one_of_the_policy(self) -> None:
        dataset = renamed(cameras={"front": (4, 4), "wrist": (4, 4)})
        found = matched_dataset(ARM, dataset, camera_names(["front=top"], ARM))
        assert found.info.cameras == {"top": (4, 4)}

    def test_the_hint_is_the_option_to_pass(self) -> None:
        two = dataclasses.replace(ARM, cameras=("top", "wrist"))
        with pytest.raises(RunError, match="needs the cameras top, wrist") as error:
            matched_dataset(two, renamed(cameras={"front": (4, 4), "hand": (4, 4)}))
        assert error.value.hint == "if they show the same, pass --camera front=top --camera hand=wrist"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["front=left"], "the policy has no camera 'left'; it has: top"),
            (["front"], "the policy has no camera 'front'"),
            (["front="], "must look like theirs=ours, got 'front='"),
            (["=top"], "must look like theirs=ours"),
            (["front=top", "front=top"], "names 'front' twice"),
        ],
    )
    def test_a_wrong_option_is_wrong_usage(self, options: list[str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            camera_names(options, ARM)

    @pytest.mark.parametrize(
        ("cameras", "message"),
        [
            ({"side": "top"}, "memory has no camera 'side'; it has: front, wrist"),
            ({"front": "top", "wrist": "top"}, "two cameras stand for 'top'"),
        ],
    )
    def test_a_map_that_fits_no_camera_is_wrong_usage(self, cameras: dict[str, str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            matched_dataset(ARM, renamed(cameras={"front": (4, 4), "wrist": (4, 4)}), cameras)


def test_a_policy_acts_with_the_order_and_the_cameras_of_a_simulator() -> None:
    there = Interface(
        what="sim", cameras=("front",), state_names=("y", "x"), action_names=("grip", "dy", "dx"), fps=10.0
    )
    policy = Counting()
    with pytest.warns(ImagewamWarning, match="is read by name"):
        acting = matched_policy(policy, there, {"front": "top"})
    picture = np.zeros((4, 4, 3), np.uint8)
    planned = acting.chunks([Observation(images={"front": picture}, state=np.array([2.0, 1.0]), instruction="go")])
    assert planned.tolist() == [[[7.0, 2.0, 1.0]]]
    assert policy.seen[0].images.keys() == {"top"}
    assert policy.seen[0].state.tolist() == [1.0, 2.0]
    assert matched_policy(policy, dataclasses.replace(ARM, what="sim")) is policy


def test_matching_reports_the_order_that_it_found() -> None:
    with pytest.warns(ImagewamWarning):
        found = match(ARM, dataclasses.replace(ARM, what=str(Path("set")), state_names=("y", "x")))
    assert found.state == (1, 0)
    assert found.action is None
    assert not found.is_identity

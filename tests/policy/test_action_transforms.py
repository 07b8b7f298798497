"""Test `policy.action_transforms`: transforms and their inverses, their saved form, and policies in the old form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.data.types import Observation
from imagewam_cli.errors import ConfigError, DatasetError, RunError
from imagewam_cli.policy.action_transforms import GripperSign, apply_all, invert_all, read_grippers, read_transform
from imagewam_cli.policy.bundle import read_bundle, write_bundle
from imagewam_cli.policy.policy import Policy

NAMES = ("x", "y", "grip")


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's policy."""
    return shutil.copytree(run / "policy", tmp_path / "policy")


def edit(folder: Path, **values: Any) -> None:
    path = folder / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_gripper_sign_maps_to_open_or_closed() -> None:
    recorded = np.array([[0.3, -0.7, 1.0], [0.3, -0.7, 0.0], [0.3, -0.7, 0.6], [0.3, -0.7, 0.5]], dtype=np.float32)
    commands = GripperSign(["grip"]).apply(recorded, NAMES)
    assert commands.dtype == np.float32
    assert commands[:, 2].tolist() == [-1.0, 1.0, -1.0, 0.0]
    assert np.array_equal(commands[:, :2], recorded[:, :2])
    assert recorded[0, 2] == 1.0, "the transform changed its input"


def test_inverse_of_gripper_sign_loses_only_the_distance_from_the_middle() -> None:
    transform = GripperSign(["y", "grip"])
    commands = np.array([[[0.3, 1.0, -1.0], [0.1, -1.0, 1.0]]], dtype=np.float32)
    assert np.array_equal(transform.apply(transform.invert(commands, NAMES), NAMES), commands)
    recorded = np.array([[0.3, 0.9, 0.1], [0.3, 0.0, 1.0]], dtype=np.float32)
    back = transform.invert(transform.apply(recorded, NAMES), NAMES)
    assert back.tolist() == np.array([[0.3, 1.0, 0.0], [0.3, 0.0, 1.0]], dtype=np.float32).tolist()


def test_transforms_are_inverted_in_reverse_order() -> None:
    transforms = (GripperSign(["grip"]), GripperSign(["grip"]))
    recorded = np.array([[0.0, 0.0, 0.0]], dtype=np.float32)
    once = GripperSign(["grip"]).apply(recorded, NAMES)
    assert np.array_equal(apply_all(transforms, recorded, NAMES), GripperSign(["grip"]).apply(once, NAMES))
    assert np.array_equal(invert_all(transforms[:1], once, NAMES), recorded)
    assert apply_all((), recorded, NAMES) is recorded


def test_actions_with_other_dimensions_are_refused() -> None:
    with pytest.raises(DatasetError, match="4 dimensions, but the policy has 3"):
        GripperSign(["grip"]).apply(np.zeros((1, 4), dtype=np.float32), NAMES)
    with pytest.raises(DatasetError, match="needs a dimension 'jaw'"):
        GripperSign(["jaw"]).apply(np.zeros((1, 3), dtype=np.float32), NAMES)


def test_a_transform_survives_plain_data() -> None:
    transform = GripperSign(["y", "grip"])
    back = read_transform(json.loads(json.dumps(transform.to_dict())), NAMES)
    assert back == transform
    assert back != GripperSign(["grip"])
    assert hash(back) == hash(transform)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (7, "must be a mapping"),
        ({"kind": "gripper_sine", "dimensions": []}, "unknown action transform 'gripper_sine'"),
        ({"kind": "gripper_sign"}, "must have the keys"),
        ({"kind": "gripper_sign", "dimensions": ["grip"], "threshold": 0.5}, "must have the keys"),
        ({"kind": "gripper_sign", "dimensions": ["jaw"]}, "unknown dimension 'jaw'"),
    ],
)
def test_malformed_transforms_are_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_transform(values, NAMES)


@pytest.mark.parametrize("indices", [3, [3], [-1], ["grip"], [True]])
def test_malformed_old_grippers_are_refused(indices: object) -> None:
    with pytest.raises(ConfigError, match="'grippers' must be a list of integers"):
        read_grippers(indices, NAMES)


def test_old_policies_act_as_before(folder: Path, tiny_weights: Path, observation: Observation, tmp_path: Path) -> None:
    """Before transforms, `policy.json` listed the indices of grippers; an empty list meant none."""
    edit(folder, grippers=[])
    assert read_bundle(folder).action_transforms == ()
    plain = Policy.load(folder, weights=tiny_weights).chunks([observation])
    edit(folder, grippers=[2])
    old = Policy.load(folder, weights=tiny_weights)
    chunk = old.chunks([observation])
    assert np.array_equal(chunk[..., :2], plain[..., :2])
    assert np.array_equal(chunk[..., 2], -np.sign(2 * plain[..., 2] - 1))

    write_bundle(folder, old.parts)
    saved = json.loads((folder / "policy.json").read_text())
    assert "grippers" not in saved
    assert saved["action_transforms"] == [{"kind": "gripper_sign", "dimensions": [saved["action_names"][2]]}]
    assert read_bundle(folder) == old.parts
    assert np.array_equal(Policy.load(folder, weights=tiny_weights).chunks([observation]), chunk)


def test_a_policy_without_transforms_is_saved_without_the_key(folder: Path) -> None:
    parts = read_bundle(folder)
    write_bundle(folder, parts)
    assert not {"action_transforms", "grippers"} & json.loads((folder / "policy.json").read_text()).keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grippers": [9]}, "'grippers' must be a list"),
        ({"action_transforms": {}}, "'action_transforms' must be a list"),
        ({"action_transforms": [{"kind": "new"}]}, "unknown action transform 'new'"),
    ],
)
def test_a_damaged_transform_names_the_file(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder, **values)
    with pytest.raises(RunError, match=message) as error:
        read_bundle(folder)
    assert error.value.message.startswith(f"{folder / 'policy.json'} is damaged: ")

"""Test that the exported policy plans, without torch, the same actions as the policy does with torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewam_cli.data.types import Observation
from imagewam_cli.export import ExportReport
from imagewam_cli.policy.policy import Policy
from imagewam_cli.runtime.actions import PlanError
from imagewam_cli.runtime.observation import ObservationError
from imagewam_cli.runtime.onnx_policy import OnnxPolicy
from tests.support.policies import observation

TOLERANCE = 1e-4

ISOLATED = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "transformers", "imagewam_cli", "imagewam_tiny",
                                      "imagewam_flux2", "safetensors", "onnx"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def live(policy_folder: Path, tiny_weights: Path) -> Policy:
    return Policy.load(policy_folder, weights=tiny_weights)


@pytest.fixture(scope="module")
def policy(onnx_export: ExportReport) -> OnnxPolicy:
    return OnnxPolicy.load(onnx_export.folder)


@pytest.mark.parametrize(
    "rows",
    [
        [observation(21)],
        [observation(22, "x")],
        [observation(23), observation(24, "put"), observation(25, "put the " + "very " * 20 + "red block down")],
        [observation(26, "put it there " * 40), observation(27)],
    ],
    ids=["one", "shorter than any sample", "three of different length", "cut"],
)
def test_chunks_equal_those_of_torch(policy: OnnxPolicy, live: Policy, rows: list[Observation]) -> None:
    chunks = policy.chunks(rows)
    assert chunks.shape == (len(rows), 5, 3)
    assert chunks.dtype == np.float32
    np.testing.assert_allclose(chunks, live.chunks(rows), atol=TOLERANCE)


def test_images_of_another_size_are_resized_as_by_the_policy(policy: OnnxPolicy, live: Policy) -> None:
    scene = observation(28)
    large = Observation(
        images={"top": np.asarray(Image.fromarray(scene.images["top"]).resize((200, 150)))},
        state=scene.state,
        instruction=scene.instruction,
    )
    np.testing.assert_allclose(policy.chunks([large]), live.chunks([large]), atol=TOLERANCE)


def test_states_far_out_of_range_are_clamped_as_by_the_policy(policy: OnnxPolicy, live: Policy) -> None:
    scene = observation(29)
    far = Observation(images=scene.images, state=np.array([100, -100, 0.5], np.float32), instruction=scene.instruction)
    np.testing.assert_array_equal(policy.normalized_state([far]), live.normalized_state([far]).numpy())
    assert np.abs(policy.normalized_state([far])).max() == 5


def test_act_plans_again_after_executing_its_actions(policy: OnnxPolicy) -> None:
    first, second = observation(30, "stop"), observation(31, "stop")
    policy.reset()
    np.testing.assert_array_equal(policy.act(first), policy.chunks([first])[0, 0])
    np.testing.assert_array_equal(policy.act(second), policy.chunks([first])[0, 1])
    np.testing.assert_array_equal(policy.act(second), policy.chunks([second])[0, 0])
    policy.reset()
    np.testing.assert_array_equal(policy.act(first), policy.chunks([first])[0, 0])
    assert policy.execute == 2


def test_missing_parts_of_an_observation_are_named(policy: OnnxPolicy) -> None:
    scene = observation(32)
    with pytest.raises(ObservationError, match="no picture of camera 'top'; there are: front"):
        policy.chunks([Observation(images={"front": scene.images["top"]}, state=scene.state, instruction="x")])
    with pytest.raises(ObservationError, match=r"state has shape \(2,\), but the policy needs \(3,\): x, y, grip"):
        policy.chunks([Observation(images=scene.images, state=scene.state[:2], instruction="x")])


def test_the_door_is_that_of_the_policy_in_torch(policy: OnnxPolicy, live: Policy) -> None:
    scene = observation(34)
    nan = Observation(images=scene.images, state=np.array([0.5, np.nan, 1]), instruction="x")
    with pytest.raises(ObservationError, match="the state is not finite: y is nan"):
        policy.act(nan)
    empty = Observation(images={"top": np.zeros((0, 0, 3), np.uint8)}, state=scene.state, instruction="x")
    with pytest.raises(ObservationError, match=r"camera 'top': got an empty picture, uint8 \(0, 0, 3\)"):
        policy.chunks([scene, empty])
    first = Observation(images={"top": scene.images["top"].transpose(2, 0, 1)}, state=[*scene.state], instruction="x")
    np.testing.assert_allclose(policy.chunks([first]), live.chunks([first]), atol=TOLERANCE)
    assert policy.chunks([]).shape == live.chunks([]).shape == (0, 5, 3)


def test_a_plan_that_is_not_finite_is_refused(onnx_export: ExportReport) -> None:
    policy = OnnxPolicy.load(onnx_export.folder)
    policy.description["action"]["scale"][1] = float("nan")  # type: ignore[index]
    with pytest.raises(PlanError, match="not finite: y"):
        policy.act(observation(35))


def test_another_instruction_is_planned_at_once(policy: OnnxPolicy) -> None:
    scene, other = observation(36), observation(36, "put it down")
    policy.reset()
    policy.act(scene)
    np.testing.assert_array_equal(policy.act(other), policy.chunks([other])[0, 0])


def test_threads_get_the_numbers_of_serial_calls(policy: OnnxPolicy) -> None:
    rows = [observation(seed) for seed in range(37, 43)]
    expected = [policy.chunks([row]) for row in rows]
    with ThreadPoolExecutor(3) as pool:
        for got, wanted in zip(pool.map(lambda row: policy.chunks([row]), rows), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder, version=9), r"version 9; this reads version 1"),
        (lambda folder: edit(folder, prefix=None), r"no prefix graph: the editor 'tiny' must run in torch"),
        (lambda folder: (folder / "loop.onnx").unlink(), r"loop\.onnx is missing"),
    ],
)
def test_a_damaged_export_is_refused(
    onnx_export: ExportReport, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        OnnxPolicy.load(folder)


def test_the_copied_policy_script_runs_without_torch_and_imagewam(
    onnx_export: ExportReport, live: Policy, tmp_path: Path
) -> None:
    scene = observation(33)
    Image.fromarray(scene.images["top"]).save(tmp_path / "picture.png")
    state = ",".join(repr(float(x)) for x in scene.state)
    result = isolated(onnx_export.folder, tmp_path, "--image", "picture.png", "--state=" + state)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["action_names"] == ["x", "y", "grip"]
    rows = [Observation(images=scene.images, state=scene.state, instruction="put the red block on the blue zone")]
    np.testing.assert_allclose(printed["actions"], live.chunks(rows)[0], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "absent.png", "--state=0,0,0"), "absent.png"),
        (("--image", "a.png", "--image", "b.png", "--state=0,0,0"), "2 picture(s) for 1 camera(s): top"),
        (("--image", "top=picture.png", "--state=0,0"), "state has shape (2,), but the policy needs (3,): x, y, grip"),
    ],
    ids=["no such file", "too many pictures", "short state"],
)
def test_the_copied_policy_script_reports_wrong_arguments(
    onnx_export: ExportReport, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    result = isolated(onnx_export.folder, tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def isolated(export: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the export's `policy.py` in a process that can import neither torch nor this project."""
    script = [sys.executable, "-c", ISOLATED, str(export / "policy.py"), *arguments]
    instruction = ["--instruction", "put the red block on the blue zone"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        script + instruction, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def edit(folder: Path, **values: object) -> None:
    description = json.loads((folder / "onnx.json").read_text())
    (folder / "onnx.json").write_text(json.dumps(description | values))

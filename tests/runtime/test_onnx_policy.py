"""Test that the exported policy plans, without torch, the same actions as the policy does with torch."""

from __future__ import annotations

import dataclasses
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

from imagewam_cli.data.normalization import Normalizer, RunningStats
from imagewam_cli.data.types import Observation
from imagewam_cli.export import ExportReport
from imagewam_cli.export.description import describe
from imagewam_cli.policy.bundle import BundleParts, read_bundle
from imagewam_cli.policy.policy import Policy
from imagewam_cli.runtime.actions import PlanError
from imagewam_cli.runtime.export_folder import ExportFolderError, with_checksums
from imagewam_cli.runtime.observation import ObservationError
from imagewam_cli.runtime.onnx_policy import OnnxPolicy
from tests.support.policies import observation

TOLERANCE = 1e-4

ISOLATED = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "transformers", "imagewam_cli", "imagewam_tiny",
                                      "imagewam_flux2", "safetensors", "onnx", "WITHOUT"}:
            raise ModuleNotFoundError(f"{name} is not here", name=name)

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
    with pytest.raises(
        ObservationError, match=r"state has shape \(2,\), but the policy needs \(3,\): gripper_x, gripper_y, opening"
    ):
        policy.chunks([Observation(images=scene.images, state=scene.state[:2], instruction="x")])


def test_the_door_is_that_of_the_policy_in_torch(policy: OnnxPolicy, live: Policy) -> None:
    scene = observation(34)
    nan = Observation(images=scene.images, state=np.array([0.5, np.nan, 1]), instruction="x")
    with pytest.raises(ObservationError, match="the state is not finite: gripper_y is nan"):
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
    with pytest.raises(PlanError, match="not finite: dy"):
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
        (lambda folder: edit(folder, execute=9), r"'execute' is 9, but it must be from 1 to the horizon, 5"),
        (lambda folder: edit(folder, fps=20), r"onnx\.json was changed after the export, or is damaged"),
        (lambda folder: edit(folder, min_onnxruntime="99.1"), r"needs onnxruntime 99\.1 or newer, but version \d"),
        (lambda folder: (folder / "onnx.json").write_text("{"), r"onnx\.json is damaged: "),
        (lambda folder: (folder / "onnx.json").write_text("[]"), r"onnx\.json is damaged: it is not a mapping"),
        (lambda folder: (folder / "onnx.json").write_text('{"version": 1}'), r"damaged: it has no key 'files'"),
        (lambda folder: (folder / "onnx.json").unlink(), r"is no ONNX export: it has no onnx\.json"),
        (lambda folder: (folder / "loop.onnx").unlink(), r"loop\.onnx is missing"),
        (lambda folder: (folder / "editor.json").unlink(), r"editor\.json is missing"),
        (
            lambda folder: os.truncate(folder / "prefix.onnx", 1000),
            r"prefix\.onnx is not .*: it has 1000 bytes",
        ),
        (lambda folder: flip(folder / "noise.npy"), r"noise\.npy is not the file that was exported: its SHA-256"),
        (lambda folder: flip(folder / "tokenizer.json"), r"tokenizer\.json is not the file that was exported"),
        (lambda folder: shutil.copy(folder / "loop.onnx", folder / "step.onnx"), r"step\.onnx is not the file"),
    ],
)
def test_a_damaged_export_is_refused(
    onnx_export: ExportReport, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ExportFolderError, match=message):
        OnnxPolicy.load(folder)


def test_the_graph_of_one_step_may_be_left_out(onnx_export: ExportReport, policy: OnnxPolicy, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    (folder / "step.onnx").unlink()
    row = observation(44)
    np.testing.assert_array_equal(OnnxPolicy.load(folder).chunks([row]), policy.chunks([row]))


def test_an_export_without_checksums_is_read_with_a_warning(
    onnx_export: ExportReport, policy: OnnxPolicy, tmp_path: Path
) -> None:
    folder = made_before(onnx_export.folder, tmp_path / "copy")
    with pytest.warns(UserWarning, match="was made before exports listed checksums"):
        found = OnnxPolicy.load(folder)
    np.testing.assert_array_equal(found.chunks([observation(45)]), policy.chunks([observation(45)]))
    os.truncate(folder / "loop.onnx", 1000)
    with (
        pytest.warns(UserWarning, match="not checked"),
        pytest.raises(ExportFolderError, match=r"cannot load .*loop\.onnx: .*Protobuf"),
    ):
        OnnxPolicy.load(folder)


def test_an_unknown_execution_provider_is_named(onnx_export: ExportReport) -> None:
    """onnxruntime itself would warn and run on the CPU."""
    for providers in (["GpuExecutionProvider"], "GpuExecutionProvider", [("GpuExecutionProvider", {"id": 0})]):
        with pytest.raises(ExportFolderError, match=r"no execution provider 'GpuExecutionProvider'; it has .*CPU"):
            OnnxPolicy.load(onnx_export.folder, providers=providers)
    assert OnnxPolicy.load(onnx_export.folder, providers="CPUExecutionProvider").execute == 2


def test_the_copied_policy_script_runs_without_torch_and_imagewam(
    onnx_export: ExportReport, live: Policy, tmp_path: Path
) -> None:
    scene = observation(33)
    Image.fromarray(scene.images["top"]).save(tmp_path / "picture.png")
    state = ",".join(repr(float(x)) for x in scene.state)
    result = isolated(onnx_export.folder, tmp_path, "--image", "picture.png", "--state=" + state)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["action_names"] == ["dx", "dy", "grip"]
    rows = [Observation(images=scene.images, state=scene.state, instruction="put the red block on the blue zone")]
    np.testing.assert_allclose(printed["actions"], live.chunks(rows)[0], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "absent.png", "--state=0,0,0"), "camera 'top': absent.png is no readable picture: "),
        (("--image", "text.png", "--state=0,0,0"), "camera 'top': text.png is no readable picture: "),
        (("--image", "cut.png", "--state=0,0,0"), "camera 'top': cut.png is no readable picture: "),
        (("--image", "deep.png", "--state=0,0,0"), "camera 'top': got a picture of mode I;16; wanted uint8"),
        (("--image", "a.png", "--image", "b.png", "--state=0,0,0"), "2 picture(s) for 1 camera(s): top"),
        (("--state=0,0,0",), "0 picture(s) for 1 camera(s): top"),
        (
            ("--image", "top=picture.png", "--state=0,0"),
            "state has shape (2,), but the policy needs (3,): gripper_x, gripper_y, opening",
        ),
        (
            (
                "--image",
                "picture.png",
            ),
            "state has shape (0,), but the policy needs (3,): gripper_x, gripper_y, opening",
        ),
        (("--image", "picture.png", "--state=0,nan,0"), "the state is not finite: gripper_y is nan"),
        (("--image", "picture.png", "--state=0,,0,0"), "--state: '' is not a number"),
        (("--image", "picture.png", "--state=0,up,0"), "--state: 'up' is not a number"),
        (("--image", "picture.png", "--state=0,0,0", "--instruction", ""), "instruction is empty"),
    ],
)
def test_the_copied_policy_script_reports_wrong_arguments(
    onnx_export: ExportReport, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    pictures(tmp_path)
    result = isolated(onnx_export.folder, tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.stderr


def test_the_copied_policy_script_reports_a_damaged_export(onnx_export: ExportReport, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    flip(folder / "loop.onnx")
    pictures(tmp_path)
    arguments = ("--image", "picture.png", "--state=0,0,0")
    result = isolated(folder, tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {folder / 'loop.onnx'} is not the file that was exported")
    assert (
        isolated(folder, tmp_path, *arguments, "--folder", os.path.relpath(onnx_export.folder, tmp_path)).returncode
        == 0
    )
    missing = isolated(folder, tmp_path, *arguments, "--folder", "nowhere")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: nowhere is no ONNX export: it has no onnx.json\n")


def test_the_copied_policy_script_names_a_missing_package(onnx_export: ExportReport, tmp_path: Path) -> None:
    pictures(tmp_path)
    for package in ("tokenizers", "onnxruntime"):
        result = isolated(onnx_export.folder, tmp_path, "--image", "picture.png", "--state=0,0,0", without=package)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"error: the package {package} is missing\nhint: pip install {package}\n"


def pictures(folder: Path) -> None:
    """Write an ordinary picture, and files that cannot be used."""
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "deep.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "deep.png").read_bytes()[:60])


def isolated(export: Path, directory: Path, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run the export's `policy.py` in a process that can import neither torch nor this project."""
    script = [sys.executable, "-c", ISOLATED.replace("WITHOUT", without), str(export / "policy.py"), *arguments]
    instruction = [] if "--instruction" in arguments else ["--instruction", "put the red block on the blue zone"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        script + instruction, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def made_before(export: Path, copy: Path) -> Path:
    """Copy an export without what older ones do not have."""
    shutil.copytree(export, copy)
    description = json.loads((copy / "onnx.json").read_text())
    kept = {key: value for key, value in description.items() if key not in ("checksums", "min_onnxruntime")}
    (copy / "onnx.json").write_text(json.dumps(kept))
    return copy


def edit(folder: Path, **values: object) -> None:
    description = json.loads((folder / "onnx.json").read_text())
    (folder / "onnx.json").write_text(json.dumps(description | values))


class TestUnusualDimensions:
    """A locked joint, meters per step, and UTM coordinates with millimeters, as the torch policy and the export act."""

    @pytest.fixture(scope="class")
    def parts(self, policy_folder: Path) -> BundleParts:
        moving = np.linspace(-1, 1, 100)
        states = RunningStats(3)
        states.update(np.stack([np.full(100, 0.3), 4.5e6 + 0.005 * moving, moving], axis=1))
        actions = RunningStats(3)
        actions.update(np.stack([np.full(100, 1.57), 4e-5 * moving, 4.5e6 + 0.005 * moving], axis=1))
        return dataclasses.replace(
            read_bundle(policy_folder),
            state_normalizer=Normalizer(mode="min_max", stats=states.result()),
            action_normalizer=Normalizer(mode="min_max", stats=actions.result()),
        )

    @pytest.fixture(scope="class")
    def unusual(self, parts: BundleParts, onnx_export: ExportReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("unusual") / "export"
        shutil.copytree(onnx_export.folder, folder)
        described = describe(parts, None, files={}, opset=17, min_onnxruntime="1.18", levels=())
        description = json.loads((folder / "onnx.json").read_text())
        description |= {"state": described["state"], "action": described["action"]}
        listed = with_checksums(description, folder, list(description["files"].values()))
        (folder / "onnx.json").write_text(json.dumps(listed))
        return folder

    @pytest.fixture(scope="class")
    def scenes(self) -> list[Observation]:
        states = ([0.301, 4_500_000.001, 0.5], [0.3, 4_500_000.003, 0.5])
        scene = observation(21)
        return [Observation(images=scene.images, state=np.array(s), instruction=scene.instruction) for s in states]

    def test_the_export_acts_as_torch_does(
        self, parts: BundleParts, unusual: Path, live: Policy, scenes: list[Observation]
    ) -> None:
        torch_policy = Policy(parts, live.expert, live.editor)
        exported = OnnxPolicy.load(unusual)
        np.testing.assert_array_equal(exported.normalized_state(scenes), torch_policy.normalized_state(scenes).numpy())
        np.testing.assert_allclose(exported.normalized_state(scenes)[:, :2], [[0, 0.2], [0, 0.6]], atol=1e-6)
        found, expected = exported.chunks(scenes), torch_policy.chunks(scenes)
        assert found.dtype == expected.dtype == np.float64
        assert (found[..., 0] == 1.57).all()
        assert (expected[..., 0] == 1.57).all()
        scale = parts.action_normalizer.scale
        np.testing.assert_allclose((found - expected)[..., 1:] * scale[1:], 0, atol=TOLERANCE)
        # A predicted 1 is 5 mm from the middle, so millimeters are in the commands.
        assert np.ptp(expected[..., 2]) > 1e-4
        assert np.abs(expected[..., 2] - 4.5e6).max() < 0.05

    def test_an_older_copy_of_the_script_returns_the_constant_too(
        self, unusual: Path, scenes: list[Observation], tmp_path: Path
    ) -> None:
        """It knows only scale and offset."""
        folder = Path(shutil.copytree(unusual, tmp_path / "older"))
        newer = json.loads((folder / "onnx.json").read_text())["action"]
        edit(folder, action={key: newer[key] for key in ("names", "scale", "offset")}, checksums={})
        assert (OnnxPolicy.load(folder).chunks(scenes)[..., 0] == np.float32(1.57)).all()

    def test_numbers_of_the_description_are_plain_json(self, unusual: Path) -> None:
        text = (unusual / "onnx.json").read_text()
        assert "Infinity" not in text
        assert "NaN" not in text
        action = json.loads(text)["action"]
        assert (action["constant"], action["dtype"], action["unscaled"]) == ([1.57, None, None], "float64", [])

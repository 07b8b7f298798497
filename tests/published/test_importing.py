"""Test that an imported checkpoint plans what its tensors compute, and that eval and export accept it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file

from imagewam_cli.cli import app
from imagewam_cli.data.types import Observation
from imagewam_cli.errors import ConfigError, EditorError, ExportError, RunError, UsageError
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.export.onnx import OnnxExporter
from imagewam_cli.policy.policy import Policy
from imagewam_cli.prefix.capture import record
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.published.checkpoint import read_checkpoint
from imagewam_cli.published.importing import import_policy
from imagewam_cli.published.robots import PROMPT, ROBOTS, Robot
from imagewam_cli.published.settings import TrainSettings
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import REFERENCE_T, image_ids, text_ids
from tests.support import published_checkpoints as checkpoints

TABLETOP = Robot(
    cameras=("top",),
    camera_layout="tile",
    image_size=(64, 64),
    normalization="min_max",
    state_names=("x", "y", "grip"),
    action_names=("x", "y", "grip"),
    action_transforms=(),
    horizon=16,
    execute=2,
    fps=10.0,
)
TRAIN = TrainSettings(inference_steps=2)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, load_tiny: Any) -> Callable[..., Path]:
    """`make(robot, change)` writes model.pt and dataset_stats.json into a new folder and returns it."""
    transformer = load_file(tiny_weights / "transformer" / "diffusion_pytorch_model.safetensors")
    spec = load_tiny().spec

    def write(robot: Robot, change: Callable[[dict[str, Any]], None] = lambda values: None) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        dims = {"state_dim": len(robot.state_names), "action_dim": len(robot.action_names)}
        values = checkpoints.checkpoint(transformer, spec, **dims)
        change(values)
        torch.save(values, folder / "model.pt")
        checkpoints.statistics(folder / "dataset_stats.json", **dims)
        return folder

    return write


def imported(source: Path, robot: Robot, weights: Path, **changes: Any) -> Path:
    out = source / f"policy-{len(list(source.iterdir()))}"
    options: dict[str, Any] = {"editor": "tiny", "robot": robot, "train": TRAIN, "weights": weights} | changes
    import_policy(source / "model.pt", source / "dataset_stats.json", out, **options)
    return out


def observation(robot: Robot, seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    height, width = (224, 224) if robot is ROBOTS["libero"] else (96, 128)
    return Observation(
        images={c: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for c in robot.cameras},
        state=rng.uniform(-0.5, 1.5, len(robot.state_names)).astype(np.float32),
        instruction="put the red block on the blue zone",
    )


def expected_chunk(source: Path, policy: Policy, row: Observation, picture: np.ndarray, state: np.ndarray) -> Any:
    """Compute normalised actions with diffusers from the tensors of the checkpoint, without a mask, in Euler steps.

    picture: the editor's input image, uint8 (H, W, 3). state: the normalised state.
    """
    values = torch.load(source / "model.pt", weights_only=True)
    editor: Any = policy.editor
    video = {k.removeprefix("mixtures.video.transformer."): v for k, v in values["mot"].items() if "transformer." in k}
    model: Any = Flux2Transformer2DModel.from_config(editor.denoiser.config)
    model.load_state_dict(Flux2Release().from_release(video))
    mot = values["mot"]
    action = {k.removeprefix("mixtures.action."): mot[k] for k in mot if k.startswith("mixtures.action.")}
    expert = ActionExpert(checkpoints.expert_config(editor.spec, action["action_encoder.weight"].shape[1]))
    expert.load_state_dict(action)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    words = editor.tokens.text([PROMPT.format(instruction=row.instruction)]).embeds
    token = values["proprio_encoder"]["weight"] @ torch.from_numpy(state) + values["proprio_encoder"]["bias"]
    words = torch.cat([words, token[None, None]], dim=1)
    names = list(editor.layer_names)
    with torch.no_grad(), record(model, names) as recording:
        model(
            hidden_states=editor.tokens.image(pixels),
            encoder_hidden_states=words,
            timestep=torch.zeros(1),
            img_ids=image_ids(picture.shape[0] // 16, picture.shape[1] // 16, t=REFERENCE_T),
            txt_ids=text_ids(words.shape[1]),
            guidance=None,
        )
    prefix = PrefixKV(tuple(recording.layers[name] for name in names), None)
    noise = initial_noise(1, 16, expert.config.action_dim, 42)
    with torch.no_grad():
        return integrate(expert, noise, None, prefix, FlowSchedule(shift=5.0), TRAIN.inference_steps)[0].numpy()


def test_libero_plans_what_its_tensors_compute(make: Any, tiny_weights: Path) -> None:
    """LIBERO: two cameras side by side, min-max scaling to [-1, 1], and a gripper that is open or closed."""
    robot = ROBOTS["libero"]
    source = make(robot)
    policy = Policy.load(imported(source, robot, tiny_weights), weights=tiny_weights)
    row = observation(robot, 0)
    low, high = (np.array([f(i) for i in range(8)]) for f in (lambda i: -1 + 0.01 * i, lambda i: 2 - 0.02 * i))
    state = np.clip(2 * (row.state - low) / (high - low) - 1, -5, 5).astype(np.float32)
    picture = np.concatenate([row.images["image"], row.images["wrist_image"]], axis=1)
    actions = (expected_chunk(source, policy, row, picture, state) + 1) / 2 * (high - low)[:7] + low[:7]
    gripper = np.where(actions[:, 6] > 0.5, -1.0, 1.0)
    chunk = policy.chunks([row])[0]
    np.testing.assert_allclose(chunk[:, :6], actions[:, :6], atol=1e-4)
    assert np.array_equal(chunk[:, 6], gripper)
    assert (policy.execute, policy.horizon, policy.parts.config.noise_seed) == (12, 16, 42)


def test_robotwin_plans_what_its_tensors_compute(make: Any, tiny_weights: Path) -> None:
    """RoboTwin: the head image above the wrist images, each resized by PIL, and z-scores."""
    from PIL import Image

    robot = ROBOTS["robotwin"]
    source = make(robot)
    policy = Policy.load(imported(source, robot, tiny_weights), weights=tiny_weights)
    row = observation(robot, 1)
    sizes = ((256, 192), (128, 96), (128, 96))
    head, left, right = (
        np.asarray(Image.fromarray(row.images[c]).resize(size, Image.Resampling.BILINEAR))
        for c, size in zip(robot.cameras, sizes, strict=True)
    )
    picture = np.concatenate([head, np.concatenate([left, right], axis=1)], axis=0)
    assert picture.shape == (288, 256, 3)
    state = ((row.state - 0.3) / 0.5).astype(np.float32)
    actions = expected_chunk(source, policy, row, picture, state) * 0.5 + 0.3
    np.testing.assert_allclose(policy.chunks([row])[0], actions, atol=1e-4)


def test_a_state_token_may_follow_the_padding(make: Any, tiny_weights: Path) -> None:
    source = make(TABLETOP)
    folder = imported(
        source, TABLETOP, tiny_weights, train=dataclasses.replace(TRAIN, placement="appended", text_tokens=40)
    )
    policy = Policy.load(folder, weights=tiny_weights)
    row = observation(TABLETOP, 2)
    prefix = policy.prefix([row])
    words = policy.editor._texts.batch([row.instruction])  # type: ignore[attr-defined]
    assert prefix.valid is not None
    assert prefix.valid[0, : words.valid.shape[1]].all()
    assert not prefix.valid[0, words.valid.shape[1] : 40].any()
    assert prefix.valid[0, 40:].all()


def test_bfloat16_checkpoint_keeps_its_rounding(make: Any, tiny_weights: Path) -> None:
    def to_bfloat16(values: dict[str, Any]) -> None:
        for part in (values["mot"], values["proprio_encoder"]):
            cast = {id(v): v.bfloat16() for v in part.values()}
            part.update({name: cast[id(v)] for name, v in list(part.items())})
        values["torch_dtype"] = "torch.bfloat16"

    source = make(TABLETOP, to_bfloat16)
    rounded = Policy.load(imported(source, TABLETOP, tiny_weights), weights=tiny_weights)
    exact = Policy.load(imported(source, TABLETOP, tiny_weights, rounding="exact"), weights=tiny_weights)
    assert rounded.parts.editor.settings.rounding == "published-bf16"
    assert rounded.expert.dtype == rounded.editor.denoiser.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert exact.parts.editor.settings.rounding == "exact"
    assert exact.expert.dtype == torch.float32
    row = observation(TABLETOP, 3)
    chunks = [policy.chunks([row]) for policy in (rounded, exact)]
    assert all(np.isfinite(chunk).all() for chunk in chunks)
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3


def test_without_proprio_the_state_has_no_effect(make: Any, tiny_weights: Path) -> None:
    source = make(TABLETOP, lambda values: values.pop("proprio_encoder"))
    policy = Policy.load(imported(source, TABLETOP, tiny_weights), weights=tiny_weights)
    row = observation(TABLETOP, 4)
    assert np.array_equal(policy.chunks([row]), policy.chunks([dataclasses.replace(row, state=row.state + 1)]))


@pytest.fixture(scope="module")
def tabletop_policy(make: Any, tiny_weights: Path) -> Path:
    return imported(make(TABLETOP), TABLETOP, tiny_weights)


def test_eval_and_export_accept_an_imported_policy(
    tabletop_policy: Path, tabletop: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", str(tiny_weights)]
    copied = tmp_path / "copy"
    assert app.run(["export", "--run", str(tabletop_policy), "--format", "bundle", "--out", str(copied), *weights]) == 0
    policy = ["--policy", str(copied), *weights, "--out"]
    closed = ["--episodes", "1", "--split", "test", "--max-steps", "3"]
    assert app.run(["eval", *policy, str(tmp_path / "closed"), *closed]) == 0
    assert app.run(["eval", *policy, str(tmp_path / "open"), "--dataset", str(tabletop), "--episodes", "1"]) == 0
    assert json.loads((tmp_path / "open" / "open_loop.json").read_text())["rows"] > 0
    assert app.run(["info", str(copied)]) == 0
    capsys.readouterr()
    row = observation(TABLETOP, 5)
    chunks = [Policy.load(p, weights=tiny_weights).chunks([row]) for p in (tabletop_policy, copied)]
    assert np.array_equal(*chunks)


def test_onnx_export_is_refused_with_the_reason(tabletop_policy: Path, tiny_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its state is a token of the editor's text"):
        OnnxExporter().export(tabletop_policy, tmp_path / "onnx", weights=tiny_weights)


def test_weights_of_another_editor_are_refused(tabletop_policy: Path, tiny_weights: Path, tmp_path: Path) -> None:
    import shutil

    changed = tmp_path / "policy"
    shutil.copytree(tabletop_policy, changed)
    shutil.rmtree(changed / "editor")
    with pytest.raises(RunError, match="weights is"):
        Policy.load(changed, weights=tiny_weights)


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["mot"].pop(name)


def _add(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["mot"].update({name: torch.zeros(1)})


def _without_a_block(values: dict[str, Any]) -> None:
    for name in [n for n in values["mot"] if "single_blocks.1." in n]:
        del values["mot"][name]


def _another_alias(values: dict[str, Any]) -> None:
    name = "mixtures.video.single_blocks.0.linear1.weight"
    values["mot"][name] = values["mot"][name] + 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_drop("mixtures.video.transformer.img_in.weight"), EditorError, "missing: img_in.weight"),
        (_add("mixtures.video.transformer.guess.weight"), EditorError, "unknown: guess.weight"),
        (_drop("mixtures.action.head.linear.weight"), EditorError, "missing: head.linear.weight"),
        (_drop("mixtures.action.action_encoder.weight"), EditorError, "lacks 'action_encoder.weight'"),
        (_add("mixtures.action.gate"), EditorError, "unknown: gate"),
        (_add("mixtures.audio.weight"), RunError, "unknown names: mixtures.audio.weight"),
        (_without_a_block, EditorError, "has 1 single blocks, but the editor tiny has 2"),
        (_another_alias, RunError, "twice with different values"),
        (_add("mixtures.video.double_blocks.9.weight"), RunError, "counterpart"),
        (lambda values: values.update(extra=1), RunError, "unknown names: extra"),
        (lambda values: values.pop("mot"), RunError, "has no 'mot'"),
        (lambda values: values["proprio_encoder"].pop("bias"), RunError, "instead of weight and bias"),
        (
            lambda values: values["proprio_encoder"].update(weight=torch.zeros(5, 3)),
            EditorError,
            "gives 5 channels, but the editor's text has 96",
        ),
        (
            lambda values: values["proprio_encoder"].update(weight=torch.zeros(96, 4)),
            ConfigError,
            "the statistics have 3 state dimensions, but the checkpoint has 4",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_no_files(
    make: Any, tiny_weights: Path, change: Any, error: Any, message: str
) -> None:
    source = make(TABLETOP, change)
    before = sorted(source.iterdir())
    with pytest.raises(error, match=message):
        imported(source, TABLETOP, tiny_weights)
    assert sorted(source.iterdir()) == before


def test_a_robot_with_other_dimensions_is_refused(make: Any, tiny_weights: Path) -> None:
    source = make(TABLETOP)
    with pytest.raises(ConfigError, match="the robot has 7 action dimensions, but the checkpoint has 3"):
        imported(source, ROBOTS["libero"], tiny_weights)


def test_an_editor_without_published_tensor_names_is_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="instruct-pix2pix has no released names"):
        imported(make(TABLETOP), TABLETOP, Path(), editor="instruct-pix2pix")


def test_the_command_imports_a_checkpoint_and_refuses_a_pickle(
    make: Any, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make(ROBOTS["robotwin"]), tmp_path / "policy"
    (source / "train_config.yaml").write_text("data: {num_frames: 9}\nmodel: {pack_proprio_after_text: true}\n")
    options = ["--editor", "tiny", "--robot", "robotwin", "--stats", str(source / "dataset_stats.json")]
    options += ["--weights", str(tiny_weights), "--out", str(out), "--config", str(source / "train_config.yaml")]
    cameras = [x for c in ("head", "left", "right") for x in ("--camera", c)]
    assert app.run(["import", str(source / "model.pt"), *options, *cameras, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["single blocks"] == 2
    policy = Policy.load(out, weights=tiny_weights)
    assert (policy.cameras, policy.horizon, policy.execute) == (("head", "left", "right"), 8, 8)

    torch.save({"mot": {}, "step": Path("anything")}, source / "model.pt")
    assert app.run(["import", str(source / "model.pt"), *options]) == 1
    message = capsys.readouterr().err
    assert "contains more than tensors and was not loaded" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_checkpoint(tmp_path / "model.pt")


def test_a_checkpoint_with_nan_is_refused(make: Any) -> None:
    source = make(TABLETOP)
    values = torch.load(source / "model.pt")
    name = next(name for name in values["mot"] if name.startswith("mixtures.action."))
    values["mot"][name] = torch.full_like(values["mot"][name], torch.nan)
    torch.save(values, source / "model.pt")
    with pytest.raises(RunError, match=f"{name} has NaN or infinite values"):
        read_checkpoint(source / "model.pt")

"""Compare InstructPix2Pix on a tiny pipeline folder with diffusers' own pipeline: keys and values of each layer.

The reference does not use our capture. It comes from hooks on the UNet's own `to_k` and `to_v` while the pipeline runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.export.onnx import OnnxExporter
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.policy.loading import load_policy
from imagewam_instruct_pix2pix.editor import InstructPix2PixEditor, unet_layers
from tests.support.editors.instruct_pix2pix import TEXT_TOKENS, assert_trained_timestep, build, watch_projections
from tests.support.hub_server import COMMIT, Hub, serve
from tests.support.policies import observation, write_policy

NAME = "instruct-pix2pix"
SIZE = 32
"""Height and width in pixels. The UNet works on 4 x 4 latents, then on 2 x 2."""
INSTRUCTIONS = ["put it left", "go"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("editors") / NAME)


def load(folder: Path, instructions: tuple[str, ...] = (), **settings: Any) -> InstructPix2PixEditor:
    chosen = {"cameras": ("top",), "image_size": (SIZE, SIZE), "compute_dtype": "float32"} | settings
    editor = load_editor(NAME, PrefixOptions(**chosen), instructions=instructions, weights=folder)
    assert isinstance(editor, InstructPix2PixEditor)
    return editor


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"top": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)} for _ in range(count)]


def pipeline_projections(folder: Path, images: list[Any], prompts: list[str]) -> dict[str, list[torch.Tensor]]:
    """Run one step of the pipeline at timestep 999; map attention modules to [k, v], each (B, tokens, channels)."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    seen = watch_projections(pipeline.unet)
    latents = target_noise((len(prompts), 4, SIZE // 8, SIZE // 8), torch.zeros(1))
    pipeline(
        prompts,
        image=[Image.fromarray(row["top"]) for row in images],
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=latents,
        output_type="latent",
    )
    assert pipeline.scheduler.timesteps.tolist() == [999]
    return seen


def test_keys_and_values_equal_the_pipelines_step(folder: Path) -> None:
    images = pictures(2)
    editor = load(folder, segments=("text", "target"))
    prefix = editor.encode(images, INSTRUCTIONS)
    expected = pipeline_projections(folder, images, INSTRUCTIONS)
    assert [layer.name for layer in editor.spec.layers] == list(expected), "every attention, in the order of the calls"
    for layer, kv in zip(editor.spec.layers, prefix.layers, strict=True):
        for mine, theirs in zip((kv.k, kv.v), expected[layer.name], strict=True):
            assert mine.shape == (2, layer.tokens, layer.heads, layer.head_dim)
            assert torch.allclose(mine.flatten(2), theirs, atol=2e-6), layer.name


def test_only_target_tokens_are_kept_by_default(folder: Path) -> None:
    editor = load(folder)
    assert {s.name for layer in editor.spec.layers for s in layer.segments} == {"target"}
    assert [layer.segments[0].grid for layer in editor.spec.layers] == [
        (4, 4),
        (2, 2),
        (2, 2),
        (2, 2),
        (2, 2),
        (4, 4),
        (4, 4),
    ]
    prefix = editor.encode(pictures(1), INSTRUCTIONS[:1])
    assert prefix.valid is None


def test_layers_are_known_from_the_config(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    editor = load(folder, segments=("text", "target"))
    assert unet_layers(unet, (SIZE, SIZE), TEXT_TOKENS) == editor.spec.layers


def test_token_counts_are_right_for_odd_numbers_of_latents(folder: Path) -> None:
    editor = load(folder, image_size=(40, 24))
    images = [{"top": np.zeros((40, 24, 3), np.uint8)}]
    for layer, kv in zip(editor.spec.layers, editor.encode(images, ["go"]).layers, strict=True):
        assert kv.k.shape[1] == layer.tokens


def test_a_batch_of_trimmed_texts_equals_its_rows_encoded_alone(folder: Path) -> None:
    images = pictures(2)
    editor = load(folder, tuple(INSTRUCTIONS), segments=("text", "target"), text_padding="trim")
    together = editor.encode(images, INSTRUCTIONS)
    assert together.valid is not None
    assert together.valid.sum(1).tolist() == [len("putitleft") + 2, len("go") + 2]
    for i in range(2):
        alone = editor.encode(images[i : i + 1], INSTRUCTIONS[i : i + 1])
        for a, b in zip(alone.layers, together.layers, strict=True):
            assert torch.allclose(a.k[0], b.k[i], atol=1e-5)
            assert torch.allclose(a.v[0], b.v[i], atol=1e-5)


@pytest.mark.parametrize(("t", "timestep"), [(1.0, 999), (0.25, 250), (0.0, 0)])
def test_noise_levels_map_to_timesteps_of_training(folder: Path, t: float, timestep: int) -> None:
    editor, (picture,) = load(folder, timestep=t), pictures(1)
    assert_trained_timestep(editor, picture, t=t, timestep=timestep, betas=(0.0001, 0.02), scaling=0.18215)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"mode": "prefix"}, "mode 'prefix' is not available for instruct-pix2pix", "denoise"),
        ({"segments": ("reference",)}, "has no reference tokens", "text, target"),
        ({"image_size": (30, 32)}, "image size 30x32 does not split", "32x32"),
        ({"layers": "7"}, "the editor has layers 0 to 6", ""),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(
    folder: Path, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(folder, **settings)
    assert hint in (caught.value.hint or "")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    (weights,) = (tmp_path / "pickled" / "unet").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(EditorError, match="can run arbitrary code"):
        load(tmp_path / "pickled")


def test_a_truncated_part_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    (weights,) = (tmp_path / "cut" / "text_encoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EditorError, match=r"text_encoder.*is cut off"):
        load(tmp_path / "cut")


def test_the_order_of_segments_makes_no_difference(folder: Path) -> None:
    orders = (("text", "target"), ("target", "text"))
    assert len({str(load(folder, segments=segments).fingerprint()) for segments in orders}) == 1
    with pytest.raises(UsageError, match="no segment is chosen"):
        load(folder, segments=())


def test_another_pipelines_folder_is_refused() -> None:
    from imagewam_tiny.editor import WEIGHTS

    with pytest.raises(
        EditorError, match="is a Flux2KleinPipeline folder, not a StableDiffusionInstructPix2PixPipeline one"
    ):
        load(WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [("target",), ("text", "target")])
def test_an_onnx_export_acts_like_its_policy(folder: Path, tmp_path: Path, segments: tuple[str, ...]) -> None:
    """Cache layout, expert and graphs must handle layers of different lengths, some with padded text."""
    editor = load(folder, segments=segments, text_padding="trim")
    policy = write_policy(tmp_path / "policy", editor)
    report = OnnxExporter().export(policy, tmp_path / "onnx", weights=folder)
    assert set(report.errors) == {"step", "loop", "chunk"}
    assert "no traceable prefix" in report.notes[0]
    row = observation(5)
    actions = [load_policy(path, weights=folder).chunks([row]) for path in (policy, tmp_path / "onnx")]
    assert np.allclose(*actions, atol=1e-4)


def test_weights_fetched_from_a_hub_build_a_cache(folder: Path, tabletop: Path, tmp_path: Path) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = b"a second copy, which nobody needs"
    cache = ("cache", "--editor", NAME, "--dataset", str(tabletop), "--stride", "20", "--image-size", f"{SIZE}x{SIZE}")
    with serve(Hub("timbrooks/instruct-pix2pix", files)) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        for arguments in (("fetch", NAME), (*cache, "--out", str(tmp_path / "cache"))):
            subprocess.run([sys.executable, "-m", "imagewam_cli", *arguments], env=environment, check=True)
    fingerprint = read_manifest(tmp_path / "cache").fingerprint
    assert fingerprint["revision"] == COMMIT
    assert fingerprint["weights"] == load(folder).weights.sha256


@pytest.mark.parametrize("padding", ["keep", "trim"])
def test_text_is_truncated_at_the_limit_in_the_entry(folder: Path, padding: str) -> None:
    editor = load(folder, segments=("text", "target"), text_padding=padding)
    limit = editor.entry.defaults.max_text_tokens
    editor.part["tokenizer"].model_max_length = 1000
    try:
        assert editor.text_tokens("go " * 500) == limit
        assert len(editor.embed("go " * 500, None).states) == limit
    finally:
        editor.part["tokenizer"].model_max_length = limit

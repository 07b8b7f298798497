"""Compare SDXL InstructPix2Pix on a tiny pipeline folder with diffusers' own pipeline: keys and values of each layer.

The reference does not use our capture. It comes from hooks on the UNet's own `to_k` and `to_v` while the pipeline runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image

from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import EditorError, UsageError
from imagewam_instruct_pix2pix.editor import unet_layers
from imagewam_instruct_pix2pix.sdxl import SdxlInstructPix2PixEditor
from tests.support.editors.instruct_pix2pix import TEXT_TOKENS, assert_trained_timestep, watch_projections
from tests.support.editors.sdxl import build

NAME = "sdxl-instruct-pix2pix"
SIZE = (48, 64)
"""Height and width in pixels. The UNet works on 6 x 8 latents, then on 3 x 4 and 2 x 2."""
INSTRUCTIONS = ["put it left", "go"]
BOTH = {"segments": ("text", "target")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("editors") / NAME)


def load(folder: Path, instructions: Sequence[str] = (), **settings: Any) -> SdxlInstructPix2PixEditor:
    chosen = {"cameras": ("top",), "image_size": SIZE, "compute_dtype": "float32"} | settings
    editor = load_editor(NAME, PrefixOptions(**chosen), instructions=instructions, weights=folder)
    assert isinstance(editor, SdxlInstructPix2PixEditor)
    return editor


def pictures(count: int, cameras: Sequence[str] = ("top",)) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    size = (SIZE[0], SIZE[1] // len(cameras), 3)
    return [{camera: rng.integers(0, 256, size, dtype=np.uint8) for camera in cameras} for _ in range(count)]


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the pipeline with a sampler that takes its only step at timestep 999 and does not rescale the latents."""
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_step(pipeline: Any, images: Sequence[dict[str, np.ndarray]], prompts: list[str], **options: Any) -> None:
    strips = [Image.fromarray(np.concatenate(list(row.values()), axis=1)) for row in images]
    latents = target_noise((len(prompts), 4, SIZE[0] // 8, SIZE[1] // 8), torch.zeros(1, dtype=pipeline.dtype))
    pipeline(
        prompts,
        image=strips,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=latents,
        output_type="latent",
        **options,
    )
    assert pipeline.scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("cameras", [("top",), ("top", "wrist")])
def test_keys_and_values_equal_the_pipelines_step(folder: Path, cameras: tuple[str, ...]) -> None:
    images = pictures(2, cameras)
    editor = load(folder, cameras=cameras, **BOTH)
    prefix = editor.encode(images, INSTRUCTIONS)
    pipeline = load_pipeline(folder)
    expected = watch_projections(pipeline.unet)
    one_step(pipeline, images, INSTRUCTIONS)
    assert [layer.name for layer in editor.spec.layers] == list(expected), "every attention, in the order of the calls"
    for layer, kv in zip(editor.spec.layers, prefix.layers, strict=True):
        for mine, theirs in zip((kv.k, kv.v), expected[layer.name], strict=True):
            assert mine.shape == (2, layer.tokens, layer.heads, layer.head_dim)
            assert torch.allclose(mine.flatten(2), theirs, rtol=0, atol=1e-5), layer.name


def test_pooled_text_and_image_size_change_the_keys(folder: Path) -> None:
    """Otherwise the test above could not tell whether the editor passes them."""
    keys = []
    pipeline = load_pipeline(folder)
    for options in ({}, {"prompt_2": ["go", "away"]}, {"original_size": (512, 512)}):
        seen = watch_projections(pipeline.unet)
        one_step(pipeline, pictures(2), INSTRUCTIONS, **options)
        keys.append(next(iter(seen.values()))[0])
    assert (keys[1] - keys[0]).abs().max() > 1e-4
    assert (keys[2] - keys[0]).abs().max() > 1e-4


def test_in_float16_the_vae_runs_in_float32_like_the_pipelines(folder: Path) -> None:
    given: list[torch.Tensor] = []
    editor, pipeline = load(folder, compute_dtype="float16"), load_pipeline(folder, torch.float16)
    for unet in (editor.denoiser, pipeline.unet):
        unet.conv_in.register_forward_pre_hook(lambda _m, args: given.extend(args))
    editor.encode(pictures(1), INSTRUCTIONS[:1])
    one_step(pipeline, pictures(1), INSTRUCTIONS[:1])
    mine, theirs = given
    assert mine.dtype == theirs.dtype == torch.float16
    assert torch.allclose(mine, theirs, rtol=0, atol=2e-3)  # one float16 step for values near 2
    assert editor.part["vae"].dtype == torch.float32


def test_layers_are_known_from_the_config(folder: Path) -> None:
    """SDXL's config lists depths and heads per block, and has blocks without attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    layers = unet_layers(unet, SIZE, TEXT_TOKENS)
    assert layers == load(folder, **BOTH).spec.layers
    targets = [layer for layer in layers if layer.name.endswith("attn1")]
    stages = {"down_blocks.1": 1, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 4, "up_blocks.1": 2}
    assert [layer.name.partition(".attentions")[0] for layer in targets] == [
        stage for stage, count in stages.items() for _ in range(count)
    ]
    large, small = ((3, 4), 2, 8), ((2, 2), 4, 8)
    assert [(t.segments[0].grid, t.heads, t.head_dim) for t in targets] == [large, *[small] * 8, *[large] * 2]


@pytest.mark.parametrize("padding", ["keep", "trim"])
def test_a_batch_equals_its_rows_encoded_alone(folder: Path, padding: str) -> None:
    images = pictures(2)
    editor = load(folder, INSTRUCTIONS, text_padding=padding, **BOTH)
    assert not {"text_encoder", "text_encoder_2"} & set(editor.part), "freed after all instructions are encoded"
    together = editor.encode(images, INSTRUCTIONS)
    assert together.valid is not None
    lengths = [len("putitleft") + 2, len("go") + 2] if padding == "trim" else [TEXT_TOKENS] * 2
    assert together.valid.sum(1).tolist() == lengths
    for i in range(2):
        alone = editor.encode(images[i : i + 1], INSTRUCTIONS[i : i + 1])
        for a, b in zip(alone.layers, together.layers, strict=True):
            assert torch.allclose(a.k[0], b.k[i], atol=1e-5)
            assert torch.allclose(a.v[0], b.v[i], atol=1e-5)


def test_trimmed_text_keeps_its_states(folder: Path) -> None:
    """Neither the states of a text nor its pooled vector depend on the padding behind it."""
    keep, trim = (load(folder, text_padding=padding).embed("go", None) for padding in ("keep", "trim"))
    assert trim.states.shape == (4, 24 + 16)
    assert torch.allclose(keep.states[:4], trim.states, atol=1e-5)
    assert keep.pooled is not None
    assert trim.pooled is not None
    assert torch.allclose(keep.pooled, trim.pooled, atol=1e-5)


@pytest.mark.parametrize("segments", [("target",), ("text",)])
def test_only_chosen_segments_are_kept(folder: Path, segments: tuple[str, ...]) -> None:
    editor = load(folder, segments=segments)
    assert {s.name for layer in editor.spec.layers for s in layer.segments} == set(segments)
    everything = load(folder, **BOTH)
    layers = dict(
        zip(
            (layer.name for layer in everything.spec.layers),
            everything.encode(pictures(1), ["go"]).layers,
            strict=True,
        )
    )
    for layer, kv in zip(editor.spec.layers, editor.encode(pictures(1), ["go"]).layers, strict=True):
        assert torch.equal(kv.k, layers[layer.name].k)


@pytest.mark.parametrize(("t", "timestep"), [(1.0, 999), (0.25, 250), (0.0, 0)])
def test_noise_levels_map_to_timesteps_of_training(folder: Path, t: float, timestep: int) -> None:
    editor, (picture,) = load(folder, timestep=t), pictures(1)
    assert_trained_timestep(editor, picture, t=t, timestep=timestep, betas=(0.00085, 0.012), scaling=0.13025)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"mode": "prefix"}, f"mode 'prefix' is not available for {NAME}", "denoise"),
        ({"segments": ("reference",)}, "has no reference tokens", "text, target"),
        ({"camera_layout": "separate"}, f"camera layout 'separate' is not available for {NAME}", "tile"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(
    folder: Path, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(folder, **settings)
    assert hint in (caught.value.hint or "")


def test_instruct_pix2pix_refuses_an_sdxl_folder(folder: Path) -> None:
    with pytest.raises(EditorError, match="is a StableDiffusionXLInstructPix2PixPipeline folder, not a"):
        load_editor("instruct-pix2pix", PrefixOptions(), instructions=(), weights=folder)

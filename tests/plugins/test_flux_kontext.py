"""Compare FLUX.1-Kontext on a tiny pipeline folder with diffusers' own pipeline: keys and values of each layer.

The reference does not use our capture; see `joint_reference`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.registry import Registry
from imagewam_flux_kontext.editor import GUIDANCE, FluxKontextEditor
from tests.support.editors import flux_kontext as flux_kontext_folder
from tests.support.editors.joint_reference import Observer, attention_mask, largest_difference, prefix_mask
from tests.support.editors.joint_tests import JointEditorTests

NAME = "flux-kontext"
HEIGHT, WIDTH = 32, 48
PICTURE = 6
"""Number of tokens in a picture: 2 rows of 3."""
TEXT = 512
INSTRUCTIONS = ["put it left", "go"]
LETTERS = [len("▁put▁it▁left") + 1, len("▁go") + 1]
"""Number of tokens in each instruction, with the end token."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_kontext_folder.build(tmp_path_factory.mktemp("editors") / NAME)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def load(folder: Path, instructions: tuple[str, ...] = (), **settings: Any) -> FluxKontextEditor:
    chosen = {"cameras": ("top",), "image_size": (HEIGHT, WIDTH), "compute_dtype": "float32"} | settings
    editor = load_editor(NAME, PrefixOptions(**chosen), instructions=instructions, weights=folder)
    assert isinstance(editor, FluxKontextEditor)
    return editor


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"top": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)} for _ in range(count)]


def pipeline_step(pipeline: Any, t: float, images: list[Any]) -> Observer:
    """Run one step of the pipeline at noise level t, with its default guidance and our image size."""
    observer = Observer(pipeline.transformer)
    reference = pipeline_reference_tokens(pipeline, images)
    noise = target_noise(reference.shape, reference)
    pipeline(
        [Image.fromarray(row["top"]) for row in images],
        INSTRUCTIONS[: len(images)],
        height=HEIGHT,
        width=WIDTH,
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
        latents=(1 - t) * reference + t * noise,
        num_inference_steps=1,
        sigmas=[t],
        output_type="latent",
    )
    return observer


def pipeline_reference_tokens(pipeline: Any, images: list[Any]) -> torch.Tensor:
    pixels = pipeline.image_processor.preprocess([Image.fromarray(row["top"]) for row in images])
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels, None)
    tokens: torch.Tensor = pipeline._pack_latents(latents, *latents.shape)
    return tokens


class TestJointEditor(JointEditorTests):
    load, pictures, instructions = staticmethod(load), staticmethod(pictures), INSTRUCTIONS
    grid, text, lengths = (2, 3), TEXT, LETTERS

    def step(self, pipeline: Any) -> Observer:
        return pipeline_step(pipeline, 1.0, pictures(1))


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_denoise_mode_equals_the_pipelines_step(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    editor = load(folder, mode="denoise", timestep=t, segments=("text", "target", "reference"))
    prefix = editor.encode(images, INSTRUCTIONS)
    assert prefix.valid is not None
    assert bool(prefix.valid.all()), "the pipeline shows all 512 positions of a padded text"
    with torch.no_grad():
        expected = pipeline_step(pipeline, t, images).layers()
    assert largest_difference(prefix, expected, slice(None)) <= 1e-5


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_prefix_mode_equals_a_step_with_the_target_hidden(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    prefix = load(folder, timestep=t).encode(images, INSTRUCTIONS)
    observer = pipeline_step(pipeline, t, images)
    with torch.no_grad(), attention_mask(prefix_mask(TEXT, PICTURE, PICTURE)):
        pipeline.transformer(**observer.inputs)
    tokens = [*range(TEXT), *range(TEXT + PICTURE, TEXT + 2 * PICTURE)]
    assert largest_difference(prefix, observer.layers(), tokens) <= 1e-5


def test_the_guidance_is_part_of_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(folder).fingerprint()
    monkeypatch.setattr("imagewam_flux_kontext.editor.GUIDANCE", GUIDANCE + 1)
    assert load(folder).fingerprint() != before


def test_guidance_is_the_pipelines_default(pipeline: Any) -> None:
    assert inspect.signature(pipeline.__call__).parameters["guidance_scale"].default == GUIDANCE


def test_text_encoders_are_freed_after_all_instructions_are_encoded(folder: Path) -> None:
    editor = load(folder, tuple(INSTRUCTIONS), text_padding="trim")
    assert not {"text_encoder", "text_encoder_2"} & editor.part.keys()
    assert editor.spec.layers[0].segments[0].tokens == max(LETTERS)


def test_a_long_instruction_is_truncated(folder: Path) -> None:
    (text,) = load(folder, segments=("text",), text_padding="trim").encode(pictures(1), ["move " * 200]).layers[0].k
    assert len(text) == TEXT


def test_describe_equals_the_spec_of_the_loaded_editor(folder: Path) -> None:
    entry = dataclasses.replace(
        Registry.installed().editors.get(NAME),
        config={"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": flux_kontext_folder.AXES},
    )
    editor = load(folder, mode="denoise")
    assert FluxKontextEditor.bound_to(entry).describe(editor.settings) == editor.spec


def test_another_pipelines_folder_is_refused() -> None:
    from imagewam_tiny.editor import WEIGHTS

    with pytest.raises(EditorError, match="is a Flux2KleinPipeline folder, not a FluxKontextPipeline one"):
        load(WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": ("target",)}, "mode 'prefix' of flux-kontext has no target tokens"),
        ({"image_size": (HEIGHT, 40)}, "does not split into 16-pixel tokens"),
        ({"layers": "3"}, "the editor has layers 0 to 2"),
        ({"camera_layout": "separate"}, "camera layout 'separate' is not available"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(folder, **settings)

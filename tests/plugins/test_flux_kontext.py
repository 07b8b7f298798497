"""FLUX.1-Kontext on a tiny pipeline folder: its keys and values are those of diffusers' own pipeline, layer by layer.

The reference is never our capture: see `joint_reference`.
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
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from plugins.joint_reference import Observer, attention_mask, largest_difference, prefix_mask

from imagewam_cli.diffusers_editor import target_noise
from imagewam_cli.editor import PrefixSettings
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.expert.attention import Rotary
from imagewam_cli.registry import Registry
from imagewam_flux_kontext.editor import GUIDANCE, FluxKontextEditor
from plugins import flux_kontext_folder

NAME = "flux-kontext"
HEIGHT, WIDTH = 32, 48
PICTURE = 6
"""Tokens of a picture: 2 rows of 3."""
TEXT = 512
INSTRUCTIONS = ["put it left", "go"]
LETTERS = [len("▁put▁it▁left") + 1, len("▁go") + 1]
"""Tokens of the instructions, the end included."""


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
    editors = Registry.installed().editors
    chosen = {"cameras": ("top",), "image_size": (HEIGHT, WIDTH), "compute_dtype": "float32"} | settings
    editor = editors.load(NAME).load(
        editors.get(NAME), PrefixSettings(**chosen), instructions=instructions, weights=folder
    )
    assert isinstance(editor, FluxKontextEditor)
    return editor


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"top": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)} for _ in range(count)]


def own_step(pipeline: Any, t: float, images: list[Any]) -> Observer:
    """One step of the pipeline from noise level t, at its default guidance and at our size."""
    observer = Observer(pipeline.transformer)
    reference = own_reference_tokens(pipeline, images)
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


def own_reference_tokens(pipeline: Any, images: list[Any]) -> torch.Tensor:
    pixels = pipeline.image_processor.preprocess([Image.fromarray(row["top"]) for row in images])
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels, None)
    tokens: torch.Tensor = pipeline._pack_latents(latents, *latents.shape)
    return tokens


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_denoise_is_the_pipelines_own_step(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    editor = load(folder, mode="denoise", timestep=t, segments=("text", "target", "reference"))
    prefix = editor.encode(images, INSTRUCTIONS)
    assert prefix.valid is not None
    assert bool(prefix.valid.all()), "the pipeline shows all 512 positions of a padded text"
    with torch.no_grad():
        expected = own_step(pipeline, t, images).layers()
    assert largest_difference(prefix, expected, slice(None)) <= 1e-5


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_prefix_is_the_step_whose_target_nobody_else_sees(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    prefix = load(folder, timestep=t).encode(images, INSTRUCTIONS)
    observer = own_step(pipeline, t, images)
    with torch.no_grad(), attention_mask(prefix_mask(TEXT, PICTURE, PICTURE)):
        pipeline.transformer(**observer.inputs)
    tokens = [*range(TEXT), *range(TEXT + PICTURE, TEXT + 2 * PICTURE)]
    assert largest_difference(prefix, observer.layers(), tokens) <= 1e-5


def test_the_target_matters_where_it_is_seen(folder: Path) -> None:
    """Else the two tests above could not tell one mode from the other."""
    images = pictures(1)
    seen, unseen = (load(folder, mode=mode).encode(images, INSTRUCTIONS[:1]) for mode in ("denoise", "prefix"))
    for i, (a, b) in enumerate(zip(seen.layers, unseen.layers, strict=True)):
        assert a.k.shape == b.k.shape
        assert torch.allclose(a.v, b.v, atol=1e-5) == (i == 0)


def test_every_segment_is_where_it_belongs(folder: Path) -> None:
    images = pictures(2)
    names = ("text", "target", "reference")
    whole = load(folder, mode="denoise", segments=names)
    everything = whole.encode(images, INSTRUCTIONS)
    start = 0
    for name in names:
        editor = load(folder, mode="denoise", segments=(name,))
        (segment,) = editor.spec.layers[0].segments
        assert segment.name == name
        assert segment.tokens == (TEXT if name == "text" else PICTURE)
        assert segment.grid == (None if name == "text" else (2, 3))
        alone = editor.encode(images, INSTRUCTIONS)
        for part, kv in zip(alone.layers, everything.layers, strict=True):
            assert torch.equal(part.k, kv.k[:, start : start + segment.tokens])
            assert torch.equal(part.v, kv.v[:, start : start + segment.tokens])
        start += segment.tokens


@pytest.mark.parametrize("padding", ["keep", "trim"])
@pytest.mark.parametrize("mode", ["prefix", "denoise"])
def test_a_batch_is_its_rows(folder: Path, padding: str, mode: str) -> None:
    images = pictures(2)
    editor = load(folder, tuple(INSTRUCTIONS), mode=mode, text_padding=padding)
    together = editor.encode(images, INSTRUCTIONS)
    assert together.valid is not None
    assert together.valid[:, :-PICTURE].sum(1).tolist() == (LETTERS if padding == "trim" else [TEXT, TEXT])
    for i in range(2):
        alone = load(folder, mode=mode, text_padding=padding).encode(images[i : i + 1], INSTRUCTIONS[i : i + 1])
        for a, b in zip(alone.layers, together.layers, strict=True):
            for mine, theirs in ((a.k, b.k), (a.v, b.v)):
                assert torch.allclose(mine[0], theirs[i][together.valid[i]], atol=1e-5)
                assert not theirs[i][~together.valid[i]].any()


def test_trimmed_text_is_the_pipelines_without_padding(folder: Path, pipeline: Any) -> None:
    images = pictures(1)
    prefix = load(folder, mode="denoise", text_padding="trim").encode(images, INSTRUCTIONS[:1])
    observer = own_step(pipeline, 1.0, images)
    inputs = dict(observer.inputs)
    for name, axis in (("encoder_hidden_states", 1), ("txt_ids", 0)):
        inputs[name] = inputs[name].narrow(axis, 0, LETTERS[0])
    with torch.no_grad():
        pipeline.transformer(**inputs)
    tokens = [*range(LETTERS[0]), *range(LETTERS[0] + PICTURE, LETTERS[0] + 2 * PICTURE)]
    assert largest_difference(prefix, observer.layers(), tokens) <= 1e-5


def test_the_guidance_is_part_of_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(folder).fingerprint()
    monkeypatch.setattr("imagewam_flux_kontext.editor.GUIDANCE", GUIDANCE + 1)
    assert load(folder).fingerprint() != before


def test_guidance_is_the_pipelines_default(pipeline: Any) -> None:
    assert inspect.signature(pipeline.__call__).parameters["guidance_scale"].default == GUIDANCE


def test_actions_are_rotated_as_the_transformer_rotates(folder: Path, pipeline: Any) -> None:
    """At ids that no other token has."""
    editor = load(folder)
    rope = editor.spec.rope
    assert rope is not None
    ids = torch.tensor([(float(rope.action_ids[0]), float(step), 0.0) for step in range(4)])
    observer = own_step(pipeline, 1.0, pictures(1))
    taken = torch.cat([observer.inputs["txt_ids"], observer.inputs["img_ids"]])
    assert not (ids[:, None] == taken[None]).all(-1).any()
    rotation = pipeline.transformer.pos_embed(ids)
    x = torch.randn(1, 4, 2, rotation[0].shape[1])
    mine = Rotary(rope, torch.arange(4))(x)
    assert torch.allclose(mine, apply_rotary_emb(x, rotation, sequence_dim=1), atol=1e-6)


def test_text_encoders_go_once_all_instructions_are_read(folder: Path) -> None:
    editor = load(folder, tuple(INSTRUCTIONS), text_padding="trim")
    assert not {"text_encoder", "text_encoder_2"} & editor.part.keys()
    assert editor.spec.layers[0].segments[0].tokens == max(LETTERS)


def test_a_long_instruction_is_cut(folder: Path) -> None:
    (text,) = load(folder, segments=("text",), text_padding="trim").encode(pictures(1), ["move " * 200]).layers[0].k
    assert len(text) == TEXT


def test_layers_are_known_without_weights(folder: Path) -> None:
    entry = dataclasses.replace(
        Registry.installed().editors.get(NAME),
        config={"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": flux_kontext_folder.AXES},
    )
    editor = load(folder, mode="denoise")
    assert FluxKontextEditor.describe(entry, editor.settings) == editor.spec


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

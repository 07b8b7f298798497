"""Compare LongCat-Image-Edit on a tiny pipeline folder with diffusers' own pipeline: keys and values of each layer.

The reference does not use our capture; see `joint_reference`. The pipeline accepts one picture at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.registry import Registry
from imagewam_longcat.editor import LongCatEditor
from imagewam_longcat.prompt import pieces
from tests.support.editors import longcat as longcat_folder
from tests.support.editors.joint_reference import Observer, attention_mask, largest_difference, prefix_mask
from tests.support.editors.joint_tests import JointEditorTests

NAME = "longcat-image-edit"
HEIGHT, WIDTH = 64, 96
PICTURE = 24
"""Number of tokens in a picture: 4 rows of 6."""
SEEN = 2 + 6
"""Number of text tokens for the picture: 2 rows of 3, and the vision start and end tokens."""
TEXT = SEEN + 512
INSTRUCTIONS = ["put it 'left'", "go"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longcat_folder.build(tmp_path_factory.mktemp("editors") / NAME)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipeline = longcat_folder.load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
    return pipeline


def add_token_types(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add the token types that transformers 5 needs and the pipeline does not pass (diffusers issue 14194)."""
    types = (kwargs["input_ids"] == model.config.image_token_id).int()
    return args, {**kwargs, "mm_token_type_ids": types}


@functools.cache
def load(folder: Path, instructions: tuple[str, ...] = (), **settings: Any) -> LongCatEditor:
    chosen = {"cameras": ("top",), "image_size": (HEIGHT, WIDTH), "compute_dtype": "float32"} | settings
    editor = load_editor(NAME, PrefixOptions(**chosen), instructions=instructions, weights=folder)
    assert isinstance(editor, LongCatEditor)
    return editor


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"top": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)} for _ in range(count)]


def pipeline_step(pipeline: Any, t: float, image: Any, prompt: str) -> Observer:
    """Run one step of the pipeline at noise level t, without guidance, at our image size."""
    observer = Observer(pipeline.transformer)
    picture = Image.fromarray(image["top"])
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pipeline.image_processor.preprocess(picture), None)
    reference = pipeline._pack_latents(latents, *latents.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", lambda _area, _ratio: (WIDTH, HEIGHT))
        # The pipeline assumes the 16 latent channels of the released VAE; this one has 4.
        prepare = pipeline.prepare_latents
        patch.setattr(pipeline, "prepare_latents", lambda image, n, _c, *rest: prepare(image, n, 4, *rest))
        pipeline(
            picture,
            prompt,
            guidance_scale=1.0,
            latents=(1 - t) * reference + t * target_noise(reference.shape, reference),
            num_inference_steps=1,
            sigmas=[t],
            output_type="latent",
        )
    return observer


def row(prefix: PrefixKV, i: int) -> PrefixKV:
    """Return row `i` of the prefix as a batch of one."""
    layers = tuple(type(kv)(kv.k[i : i + 1], kv.v[i : i + 1]) for kv in prefix.layers)
    return PrefixKV(layers, None if prefix.valid is None else prefix.valid[i : i + 1])


class TestJointEditor(JointEditorTests):
    load, pictures, instructions = staticmethod(load), staticmethod(pictures), INSTRUCTIONS
    grid, text, lengths = (4, 6), TEXT, [SEEN + len(i) for i in INSTRUCTIONS]

    def step(self, pipeline: Any) -> Observer:
        return pipeline_step(pipeline, 1.0, pictures(1)[0], INSTRUCTIONS[0])


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_denoise_mode_equals_the_pipelines_step(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    editor = load(folder, mode="denoise", timestep=t, segments=("text", "target", "reference"))
    prefix = editor.encode(images, INSTRUCTIONS)
    assert prefix.valid is not None
    assert bool(prefix.valid.all()), "the pipeline shows all 512 positions of a padded instruction"
    for i, prompt in enumerate(INSTRUCTIONS):
        expected = pipeline_step(pipeline, t, images[i], prompt).layers()
        assert largest_difference(row(prefix, i), expected, slice(None)) <= 1e-5


@pytest.mark.parametrize("t", [1.0, 0.25])
def test_prefix_mode_equals_a_step_with_the_target_hidden(folder: Path, pipeline: Any, t: float) -> None:
    images = pictures(2)
    prefix = load(folder, timestep=t).encode(images, INSTRUCTIONS)
    tokens = [*range(TEXT), *range(TEXT + PICTURE, TEXT + 2 * PICTURE)]
    for i, prompt in enumerate(INSTRUCTIONS):
        observer = pipeline_step(pipeline, t, images[i], prompt)
        with torch.no_grad(), attention_mask(prefix_mask(TEXT, PICTURE, PICTURE)):
            pipeline.transformer(**observer.inputs)
        assert largest_difference(row(prefix, i), observer.layers(), tokens) <= 1e-5


def test_the_text_encoder_sees_the_picture(folder: Path) -> None:
    """Every row needs the encoder, so it is not freed after all instructions are known."""
    editor = load(folder, tuple(INSTRUCTIONS), segments=("text",))
    assert "text_encoder" in editor.part
    first, second = editor.encode(pictures(2), [INSTRUCTIONS[0]] * 2).layers[0].v
    assert not torch.allclose(first[SEEN:], second[SEEN:], atol=1e-3)


@pytest.mark.parametrize(
    "prompt", ["go", "write 'go left' on it", 'it\'s "red" “blue” ‘green’', "'a' 'b'", "the dog's 'bone", ""]
)
def test_quotations_are_split_like_in_the_pipeline(prompt: str) -> None:
    expected = [
        piece
        for part, quoted in pipeline_longcat_image_edit.split_quotation(prompt)
        for piece in (part if quoted else [part])
    ]
    assert list(pieces(prompt)) == expected


def test_two_apostrophes_are_not_a_quotation() -> None:
    prompt = "don't touch the robot's arm"
    assert list(pieces(prompt)) == [prompt]


def test_the_pipelines_wording_is_part_of_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, here = pictures(1), load(folder)
    family = pipeline_longcat_image_edit.LongCatImageEditPipeline
    own = family.__init__

    def reworded(self: Any, *args: Any, **parts: Any) -> None:
        own(self, *args, **parts)
        self.prompt_template_encode_prefix = self.prompt_template_encode_prefix.replace("expert", "artist")

    before, kept = here.fingerprint(), here.encode(images, INSTRUCTIONS[:1])
    monkeypatch.setattr(family, "__init__", reworded)
    there = load.__wrapped__(folder)
    assert not torch.equal(there.encode(images, INSTRUCTIONS[:1]).layers[0].k, kept.layers[0].k)
    assert there.fingerprint() != before
    assert {key for key in before if there.fingerprint()[key] != before[key]} == {"recipe"}


def test_pictures_are_always_resized_with_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AutoImageProcessor` would use torchvision if it is installed, which gives other pixels."""
    monkeypatch.setattr("transformers.models.auto.image_processing_auto.AutoImageProcessor.from_pretrained", None)
    assert isinstance(load.__wrapped__(folder).part["text_processor"], Qwen2VLImageProcessorPil)


def test_trimmed_text_needs_the_released_picture_processor(folder: Path, tmp_path: Path) -> None:
    """Padded text gives positions by its length. Trimmed text needs the released number of picture tokens."""
    other = shutil.copytree(folder, tmp_path / NAME)
    path = other / "text_processor" / "preprocessor_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_pixels")}
    path.write_text(json.dumps(config | {"size": {"shortest_edge": 112 * 112, "longest_edge": 256 * 28 * 28}}))
    load.__wrapped__(other, text_padding="keep").encode(pictures(1), INSTRUCTIONS[:1])
    with pytest.raises(EditorError, match="LongCat's own processor gives 8") as caught:
        load.__wrapped__(other, text_padding="trim")
    assert "--text-padding keep" in (caught.value.hint or "")


def test_a_long_instruction_is_truncated(folder: Path) -> None:
    (text,) = load(folder, segments=("text",), text_padding="trim").encode(pictures(1), ["move " * 200]).layers[0].k
    assert len(text) == TEXT


@pytest.mark.parametrize("size", [(112, 160), (512, 512)])
def test_describe_equals_the_spec_of_the_loaded_editor(folder: Path, size: tuple[int, int]) -> None:
    entry = dataclasses.replace(
        Registry.installed().editors.get(NAME),
        config={"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": longcat_folder.AXES},
    )
    editor = load(folder, image_size=size)
    assert LongCatEditor.bound_to(entry).describe(editor.settings) == editor.spec


def test_memory_is_the_sum_of_all_parts() -> None:
    kind = installed_editor(NAME)
    assert kind.memory_bytes() == 2 * sum(c.parameters for c in kind.entry.components.values())


def test_another_pipelines_folder_is_refused() -> None:
    from imagewam_tiny.editor import WEIGHTS

    with pytest.raises(EditorError, match="is a Flux2KleinPipeline folder, not a LongCatImageEditPipeline one"):
        load(WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": ("target",)}, "mode 'prefix' of longcat-image-edit has no target tokens"),
        ({"image_size": (HEIGHT, 40)}, "does not split into 16-pixel tokens"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(folder, **settings)

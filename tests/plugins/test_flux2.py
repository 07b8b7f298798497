"""Compare FLUX.2-klein on a tiny pipeline folder with diffusers' own pipeline: keys and values of each layer.

The reference does not use our capture. It comes from hooks on the transformer's own projections and norms while the
pipeline takes one step, rotated by diffusers' own function. The reference of a forward without a target is the
pipeline's step with a mask that hides the target from text and references.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from torch import Tensor

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import UsageError
from imagewam_cli.export.description import prefix_inputs
from imagewam_cli.export.graphs import traced_prefix
from imagewam_cli.policy.loading import prefix_arrays
from imagewam_cli.prefix.positions import layer_ids, rotate_keys, unrotate
from imagewam_cli.registry import Registry
from imagewam_cli.runtime.onnx_policy import PrefixGraph
from imagewam_flux2.editor import Flux2Editor
from tests.support.editors.flux2 import build

NAME = "flux2-klein-4b"
INSTRUCTIONS = ["put the red block on the blue zone", "go"]
CAMERAS = ("top", "wrist")
HEIGHT, WIDTH = 64, 80
"""Size of a camera's picture: 4 x 5 tokens, the smallest that the pipeline accepts."""
TOKENS = 20
ONE, TILED, SEPARATE = {"cameras": CAMERAS[:1]}, {"cameras": CAMERAS}, {"cameras": CAMERAS, "camera_layout": "separate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("editors") / NAME)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path, instructions: Sequence[str] = (), **settings: Any) -> Flux2Editor:
    cameras = settings.get("cameras", ("top",))
    chosen = {"image_size": (HEIGHT, WIDTH * len(cameras)), "compute_dtype": "float32", "cameras": cameras} | settings
    editor = load_editor(NAME, PrefixOptions(**chosen), instructions=instructions, weights=folder)
    assert isinstance(editor, Flux2Editor)
    return editor


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{c: rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for c in CAMERAS} for _ in range(count)]


def references(editor: Flux2Editor, row: dict[str, np.ndarray]) -> list[Image.Image]:
    """Return the reference images that a user of the pipeline would pass for this row."""
    shown = [row[camera] for camera in editor.settings.cameras]
    if editor.settings.camera_layout == "tile":
        shown = [np.concatenate(shown, axis=1)]
    return [Image.fromarray(picture) for picture in shown]


def pipeline_step(
    pipeline: Any, images: list[Image.Image], t: float, target: Tensor, text: dict[str, Any], mask: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's k and v, (1, tokens, heads, head size), in one step of the pipeline at noise level t.

    target: the latents of the step as tokens (1, T, C); mask: bool (1, 1, S, S).
    """
    transformer, seen = pipeline.transformer, {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.setdefault(name, []).append(out))
        for name, module in transformer.named_modules()
        if name == "pos_embed"
        or name.endswith((".norm_k", ".norm_added_k", ".to_v", ".add_v_proj", ".to_qkv_mlp_proj"))
    ]
    width, height = images[0].size
    pipeline(
        image=images,
        num_inference_steps=1,
        sigmas=[t / (3 - 2 * t)],  # inverse of the scheduler's shift by 3
        guidance_scale=1.0,
        latents=target.transpose(1, 2).reshape(1, -1, height // 16, width // 16),
        output_type="latent",
        attention_kwargs=None if mask is None else {"attention_mask": mask},
        **text,
    )
    for handle in handles:
        handle.remove()
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx([1000 * t])
    return keys_and_values_of(transformer, seen)


def keys_and_values_of(transformer: Any, seen: dict[str, list[Any]]) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's rotated k and v, from the outputs that the hooks of `pipeline_step` collected."""
    of_pictures, of_text = seen["pos_embed"]  # the transformer embeds picture positions first
    rope = tuple(torch.cat(parts) for parts in zip(of_text, of_pictures, strict=True))
    found = []
    for name in [f"transformer_blocks.{i}.attn" for i in range(len(transformer.transformer_blocks))]:
        k = torch.cat([*seen[f"{name}.norm_added_k"], *seen[f"{name}.norm_k"]], dim=1)
        v = torch.cat([*seen[f"{name}.add_v_proj"], *seen[f"{name}.to_v"]], dim=1)
        found.append((k, v))
    for name in [f"single_transformer_blocks.{i}.attn" for i in range(len(transformer.single_transformer_blocks))]:
        # Single blocks fuse q, k, v and the MLP into one projection; v is its third part.
        inner = transformer.get_submodule(name).inner_dim
        found.append((seen[f"{name}.norm_k"][0], seen[f"{name}.to_qkv_mlp_proj"][0][..., 2 * inner : 3 * inner]))
    return [(apply_rotary_emb(k, rope, sequence_dim=1), v.unflatten(-1, k.shape[-2:])) for k, v in found]


def clean_target(pipeline: Any, image: Image.Image) -> Tensor:
    """Return the tokens (1, T, C) of `image`, which replaces the unknown target."""
    pixels = pipeline.image_processor.preprocess(image, height=image.height, width=image.width)
    with torch.no_grad():
        tokens, _ = pipeline.prepare_image_latents([pixels], 1, None, torch.device("cpu"), torch.float32)
    return tokens


def mask_of_hidden_target(text: int, target: int, reference: int) -> Tensor:
    """Return a mask, bool (1, 1, S, S) over [text | target | reference], in which only the target sees the target."""
    is_target = torch.tensor([False] * text + [True] * target + [False] * reference)
    return (is_target[:, None] | ~is_target[None, :])[None, None]


def assert_same(prefix: Any, row: int, expected: Sequence[tuple[Tensor, Tensor]], keep: slice | Tensor) -> None:
    assert len(prefix.layers) == len(expected)
    for i, (kv, (k, v)) in enumerate(zip(prefix.layers, expected, strict=True)):
        for mine, theirs in ((kv.k[row], k[0, keep]), (kv.v[row], v[0, keep])):
            assert mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= 1e-5, f"layer {i}"


@pytest.mark.parametrize("cameras", [ONE, TILED, SEPARATE], ids=["one", "tile", "separate"])
@pytest.mark.parametrize("t", [1.0, 0.25])
def test_denoise_mode_equals_the_pipelines_step(folder: Path, pipeline: Any, cameras: dict[str, Any], t: float) -> None:
    settings = {"mode": "denoise"} | ({} if t == 1.0 else {"timestep": t})
    editor, rows = load(folder, **settings, **cameras), pictures(2)
    prefix = editor.encode(rows, INSTRUCTIONS)
    assert editor.spec.timestep == t
    for i, (row, instruction) in enumerate(zip(rows, INSTRUCTIONS, strict=True)):
        images = references(editor, row)
        clean = clean_target(pipeline, images[0])
        target = (1 - t) * clean + t * target_noise(clean.shape, clean)
        assert_same(prefix, i, pipeline_step(pipeline, images, t, target, {"prompt": instruction}), slice(None))


@pytest.mark.parametrize("cameras", [ONE, TILED, SEPARATE], ids=["one", "tile", "separate"])
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_prefix_mode_equals_a_step_with_the_target_hidden(
    folder: Path, pipeline: Any, cameras: dict[str, Any], t: float
) -> None:
    editor, rows = load(folder, **cameras, **({"timestep": t} if t else {})), pictures(2)
    prefix = editor.encode(rows, INSTRUCTIONS)
    assert (editor.spec.mode, editor.spec.timestep) == ("prefix", t)
    for i, (row, instruction) in enumerate(zip(rows, INSTRUCTIONS, strict=True)):
        images = references(editor, row)
        target = torch.randn(clean_target(pipeline, images[0]).shape, generator=torch.Generator().manual_seed(i))
        mask = mask_of_hidden_target(512, target.shape[1], TOKENS * len(editor.settings.cameras))
        visible = mask[0, 0, 0]
        assert_same(prefix, i, pipeline_step(pipeline, images, t, target, {"prompt": instruction}, mask), visible)


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
def test_trimmed_text_equals_the_pipeline_run_without_padding(folder: Path, pipeline: Any, mode: str) -> None:
    editor, rows = load(folder, mode=mode, text_padding="trim", timestep=1.0, **SEPARATE), pictures(2)
    prefix = editor.encode(rows, INSTRUCTIONS)
    assert prefix.valid is not None
    for i, (row, instruction) in enumerate(zip(rows, INSTRUCTIONS, strict=True)):
        length = len(editor.tokens.token_ids(instruction))
        with torch.no_grad():
            embeds = pipeline.encode_prompt(instruction)[0][:, :length]
        images = references(editor, row)
        noise = target_noise((1, TOKENS, 32), embeds)
        mask = mask_of_hidden_target(length, TOKENS, 2 * TOKENS)
        given = {"prompt_embeds": embeds}
        expected = pipeline_step(pipeline, images, 1.0, noise, given, mask if mode == "prefix" else None)
        seen = mask[0, 0, 0] if mode == "prefix" else torch.ones_like(mask[0, 0, 0])
        valid = prefix.valid[i]
        assert valid.sum() == seen.sum()
        layers = tuple(type(kv)(kv.k[i : i + 1, valid], kv.v[i : i + 1, valid]) for kv in prefix.layers)
        assert_same(type(prefix)(layers, None), 0, expected, seen)


HEAD = {"cameras": ("top", "left", "right"), "camera_layout": "head-over-wrists", "image_size": (96, 64)}


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
@pytest.mark.parametrize("padding", ["keep", "trim"])
@pytest.mark.parametrize("cameras", [ONE, TILED, SEPARATE, HEAD], ids=["one", "tile", "separate", "head-over-wrists"])
def test_position_ids_equal_the_pipelines(
    folder: Path, pipeline: Any, cameras: dict[str, Any], padding: str, mode: str
) -> None:
    settings = {
        "mode": mode,
        "text_padding": padding,
        "segments": Registry.installed().editors.get(NAME).defaults.modes[mode].segments,
    }
    editor = load(folder, INSTRUCTIONS[:1], **settings, **cameras)
    height, width = editor.settings.image_size
    count = len(editor.settings.cameras) if editor.settings.camera_layout == "separate" else 1
    shown = [Image.new("RGB", (width // count, height))] * count
    seen: dict[str, Any] = {}
    handle = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, kw: seen.update(kw), with_kwargs=True)
    target = torch.zeros(1, height * width // count // 256, 32)
    pipeline_step(pipeline, shown, 1.0, target, {"prompt": INSTRUCTIONS[0]})
    handle.remove()
    text = 512 if padding == "keep" else len(editor.tokens.token_ids(INSTRUCTIONS[0]))
    pictures = seen["img_ids"][0, target.shape[1] if mode == "prefix" else 0 :]
    expected = torch.cat([seen["txt_ids"][0, :text], pictures]).float()
    for layer in editor.spec.layers:
        found = layer_ids(layer)
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rounding", ["exact", "published-bf16"])
def test_unrotate_restores_the_keys_before_rotation(folder: Path, rounding: str) -> None:
    dtype = {"compute_dtype": "bfloat16" if rounding == "published-bf16" else "float32"}
    editor, before = load(folder, INSTRUCTIONS[:1], rounding=rounding, **dtype, **SEPARATE), {}
    for name, module in editor.denoiser.named_modules():
        if name.endswith((".norm_k", ".norm_added_k")):
            module.register_forward_hook(lambda _m, _a, out, name=name: before.update({name: out}))
    prefix, spec = editor.encode(pictures(1), INSTRUCTIONS[:1]), editor.spec
    assert spec.rope is not None
    error = 1e-5 if rounding == "exact" else 2e-2  # one rounding of a key to bfloat16
    for layer, kv in zip(spec.layers, prefix.layers, strict=True):
        parts = [before[f"{layer.name}.{n}"] for n in ("norm_added_k", "norm_k") if f"{layer.name}.{n}" in before]
        ids = layer_ids(layer)
        assert ids is not None
        plain = unrotate(kv.k, ids, spec.rope)
        assert (plain - torch.cat(parts, dim=1)).abs().max() <= error
        assert (rotate_keys(plain, ids, spec.rope) - kv.k).abs().max() <= 1e-5
        assert (plain - kv.k).abs().max() > 0.1, "the keys are rotated"


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
@pytest.mark.parametrize("padding", ["keep", "trim"])
def test_a_batch_equals_its_rows_encoded_alone(folder: Path, mode: str, padding: str) -> None:
    editor, rows = load(folder, INSTRUCTIONS, mode=mode, text_padding=padding, **SEPARATE), pictures(2)
    together = editor.encode(rows, INSTRUCTIONS)
    for i in range(2):
        alone = editor.encode(rows[i : i + 1], INSTRUCTIONS[i : i + 1])
        for a, b, layer in zip(alone.layers, together.layers, editor.spec.layers, strict=True):
            assert a.k.shape[1] == layer.tokens
            assert torch.allclose(a.k[0], b.k[i], atol=1e-5)
            assert torch.allclose(a.v[0], b.v[i], atol=1e-5)


def test_each_separate_camera_is_a_segment_with_its_own_grid(folder: Path) -> None:
    grids = {}
    for name, cameras in (("tile", TILED), ("separate", SEPARATE)):
        spec = load(folder, mode="denoise", **cameras).spec
        assert spec.image_size == (HEIGHT, 2 * WIDTH)
        grids[name] = [(s.name, s.grid) for s in spec.layers[0].segments]
    assert grids["tile"] == [("text", None), ("target", (4, 10)), ("reference", (4, 10))]
    assert grids["separate"] == [("text", None), ("target", (4, 5)), *[("reference", (4, 5))] * 2]


@pytest.mark.parametrize(
    "segments", [("text",), ("target",), ("reference",), ("target", "reference"), ("reference", "text")]
)
def test_chosen_segments_are_slices_of_the_whole_prefix(folder: Path, segments: tuple[str, ...]) -> None:
    settings = {"mode": "denoise", "text_padding": "trim", **SEPARATE}
    row, instruction = pictures(1), INSTRUCTIONS[:1]
    everything, editor = load(folder, instruction, **settings), load(folder, instruction, segments=segments, **settings)
    names = [s.name for s in everything.spec.layers[0].segments for _ in range(s.tokens)]
    kept = torch.tensor([name in segments for name in names])
    prefix = editor.encode(row, instruction)
    assert (prefix.valid is not None) == ("text" in segments)
    for a, b, layer in zip(prefix.layers, everything.encode(row, instruction).layers, editor.spec.layers, strict=True):
        assert layer.tokens == kept.sum()
        assert torch.equal(a.k, b.k[:, kept])
        assert torch.equal(a.v, b.v[:, kept])


@pytest.mark.parametrize(
    ("name", "settings", "message", "hint"),
    [
        ("tiny", {"mode": "denoise"}, "mode 'denoise' is not available for tiny", "--mode prefix"),
        ("tiny", {"camera_layout": "separate"}, "camera layout 'separate' is not available for tiny", "tile"),
        (NAME, {"mode": "edit"}, f"mode 'edit' is not available for {NAME}", "prefix, denoise"),
        (NAME, {"camera_layout": "stack"}, f"camera layout 'stack' is not available for {NAME}", "tile, separate"),
        (NAME, {"segments": ("target",)}, "mode 'prefix' of .* has no target tokens", "text, reference"),
        (NAME, {"image_size": (32, 48), **SEPARATE}, "image size 32x48 does not split into .* 2 camera", "32x64"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(
    name: str, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        installed_editor(name).describe(PrefixOptions(**settings))
    assert hint in (caught.value.hint or "")


def test_denoise_mode_has_no_graph(folder: Path) -> None:
    """tests/export/test_onnx.py tests what an export does instead."""
    assert load(folder, mode="denoise").prefix_graph() is None


def test_the_graph_with_separate_cameras_equals_encode(folder: Path) -> None:
    editor, rows = load(folder, text_padding="trim", **SEPARATE), pictures(2)
    graph = editor.prefix_graph()
    assert graph is not None
    recipe = PrefixGraph(prefix_inputs(graph), graph.tokenizer, graph=None)
    inputs = (np.stack([recipe.picture(row) for row in rows]), *recipe.tokens(INSTRUCTIONS))
    with torch.no_grad():
        outputs = graph.module(*map(torch.from_numpy, inputs))
    expected = prefix_arrays(editor.encode(rows, INSTRUCTIONS), editor.spec.layers)
    for name, output in zip(traced_prefix(graph, editor.spec.layers).outputs, outputs, strict=True):
        np.testing.assert_allclose(output.numpy(), expected.pop(name), atol=1e-5, err_msg=name)
    assert not expected

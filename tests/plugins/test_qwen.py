"""Compare Qwen-Image-Edit on tiny pipeline folders with diffusers' own pipelines: keys and values of each layer.

The reference does not use our capture. It comes from hooks on the transformer's own projections and norms while the
pipeline runs, rotated by diffusers' own function. For a prefix, an explicit mask hides the target.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.target import target_noise
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.expert.attention import Rotary
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.positions import layer_ids, tables
from imagewam_qwen import reader
from imagewam_qwen.editor import QwenEditor
from imagewam_qwen.processor import PictureProcessor
from tests.support.editors.qwen import build

BASE, PLUS, CLEAN = "qwen-image-edit", "qwen-image-edit-plus", "qwen-image-edit-2511"
HEIGHT, WIDTH = 64, 96
"""Size of a camera's picture: 4 x 6 tokens."""
TOKENS = 24
CHANNELS = 16
INSTRUCTIONS = ["put the red block on the blue zone", "go"]
Recorded = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("editors")
    return {
        BASE: build(path / BASE),
        PLUS: build(path / PLUS, plus=True),
        CLEAN: build(path / CLEAN, plus=True, zero_cond_t=True),
    }


def load(folders: dict[str, Path], name: str, instructions: tuple[str, ...] = (), **settings: Any) -> QwenEditor:
    cameras = settings.setdefault("cameras", ("top",))
    chosen = {"image_size": (HEIGHT, WIDTH * len(cameras)), "compute_dtype": "float32"} | settings
    editor = load_editor(name, PrefixOptions(**chosen), instructions=instructions, weights=folders[name])
    assert isinstance(editor, QwenEditor)
    return editor


def pictures(count: int, cameras: tuple[str, ...] = ("top",)) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{c: rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for c in cameras} for _ in range(count)]


def pipeline(folder: Path, *, token_types: bool = True) -> Any:
    """Load diffusers' own pipeline. token_types: pass the encoder its token types, which the pipeline drops."""
    family = QwenImageEditPipeline if folder.name == BASE else QwenImageEditPlusPipeline
    processor = PictureProcessor.from_pretrained(folder / "processor")
    made = family.from_pretrained(folder, processor=processor)
    made.set_progress_bar_config(disable=True)
    if token_types:

        def with_types(_encoder: Any, args: Any, kwargs: Any) -> Any:
            types = processor.create_mm_token_type_ids(kwargs["input_ids"])
            return args, kwargs | {"mm_token_type_ids": torch.tensor(types)}

        made.text_encoder.register_forward_pre_hook(with_types, with_kwargs=True)
    return made


@contextlib.contextmanager
def record_projections(transformer: Any) -> Iterator[Recorded]:
    """Yield a dictionary that is filled at the end: attention module -> k, v (B, tokens, heads, size).

    Tokens are [text | pictures]. Keys are rotated by diffusers' own function.
    """
    seen: dict[str, Any] = {}
    handles = [transformer.pos_embed.register_forward_hook(lambda _m, _a, out: seen.update(rope=out))]
    names = [f"transformer_blocks.{i}.attn" for i in range(len(transformer.transformer_blocks))]
    for name in names:
        for part in ("norm_k", "norm_added_k", "to_v", "add_v_proj"):
            module = transformer.get_submodule(f"{name}.{part}")
            key = f"{name}.{part}"
            handles.append(module.register_forward_hook(lambda _m, _a, out, key=key: seen.update({key: out})))
    recorded: Recorded = {}
    yield recorded
    for handle in handles:
        handle.remove()
    image, text = seen["rope"]
    for name in names:
        k = [seen[f"{name}.norm_added_k"], seen[f"{name}.norm_k"]]
        v = [seen[f"{name}.add_v_proj"], seen[f"{name}.to_v"]]
        rotated = [apply_rotary_emb_qwen(x, at, use_real=False) for x, at in zip(k, (text, image), strict=True)]
        k_all = torch.cat(rotated, dim=1)
        recorded[name] = k_all, torch.cat(v, dim=1).reshape(k_all.shape)


def one_step(patch: pytest.MonkeyPatch, pipe: Any, shown: list[np.ndarray], instruction: str) -> Recorded:
    """Run one step of the pipeline at timestep 1, without resizing the pictures."""
    height, width, _ = shown[0].shape
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _area, _ratio: (width, height, None))
    patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", height * width)
    images = [Image.fromarray(x) for x in shown]
    noise = target_noise((1, height * width // 256, CHANNELS), torch.zeros(1))
    with record_projections(pipe.transformer) as recorded:
        pipe(
            image=images[0] if isinstance(pipe, QwenImageEditPipeline) else images,
            prompt=instruction,
            height=height,
            width=width,
            num_inference_steps=1,
            true_cfg_scale=1.0,
            latents=noise,
            output_type="latent",
        )
    assert pipe.scheduler.timesteps.tolist() == [1000.0]
    return recorded


def largest_difference(prefix: PrefixKV, editor: QwenEditor, expected: Recorded) -> float:
    assert [layer.name for layer in editor.spec.layers] == list(expected), "every attention, in the order of the calls"
    differences = []
    for kv, (k, v) in zip(prefix.layers, expected.values(), strict=True):
        assert kv.k.shape == k.shape
        differences += [(kv.k - k).abs().max(), (kv.v - v).abs().max()]
    return float(max(differences))


CASES = [
    (BASE, ("top",), "tile"),
    (BASE, ("top", "wrist"), "tile"),
    (PLUS, ("top",), "tile"),
    (PLUS, ("top", "wrist"), "tile"),
    (PLUS, ("top", "wrist"), "separate"),
    (CLEAN, ("top", "wrist"), "separate"),
]


@pytest.mark.parametrize(("name", "cameras", "layout"), CASES)
def test_denoise_mode_equals_the_pipelines_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, cameras: tuple[str, ...], layout: str
) -> None:
    (row,) = pictures(1, cameras)
    editor = load(folders, name, mode="denoise", cameras=cameras, camera_layout=layout)
    prefix = editor.encode([row], INSTRUCTIONS[:1])
    shown = list(row.values())
    shown = shown if layout == "separate" else [np.concatenate(shown, axis=1)]
    expected = one_step(monkeypatch, pipeline(folders[name]), shown, INSTRUCTIONS[0])
    assert largest_difference(prefix, editor, expected) <= 1e-5


def test_without_token_types_a_step_equals_the_unmodified_pipeline(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = pictures(1)
    expected = one_step(monkeypatch, pipeline(folders[BASE], token_types=False), list(row.values()), INSTRUCTIONS[0])
    with_types = load(folders, BASE, mode="denoise")
    assert largest_difference(with_types.encode([row], INSTRUCTIONS[:1]), with_types, expected) > 1e-3
    monkeypatch.setattr(reader, "_with_token_types", lambda *_: None)
    without_types = load(folders, BASE, mode="denoise")
    assert largest_difference(without_types.encode([row], INSTRUCTIONS[:1]), without_types, expected) <= 1e-5


@pytest.mark.parametrize(
    ("name", "cameras", "layout", "timestep"),
    [(*case, timestep) for case, timestep in zip(CASES, (1.0, 0.25, 0.0, 1.0, 0.25, 0.25), strict=True)],
)
def test_prefix_mode_equals_a_step_with_the_target_hidden(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cameras: tuple[str, ...],
    layout: str,
    timestep: float,
) -> None:
    (row,) = pictures(1, cameras)
    editor = load(folders, name, cameras=cameras, camera_layout=layout, timestep=timestep)
    prefix = editor.encode([row], INSTRUCTIONS[:1])
    shown = list(row.values())
    shown = shown if layout == "separate" else [np.concatenate(shown, axis=1)]
    target = shown[0].shape[0] * shown[0].shape[1] // 256
    text = editor.text_tokens(INSTRUCTIONS[0])
    own = F.scaled_dot_product_attention

    def hidden(query: Any, key: Any, value: Any, **options: Any) -> Any:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        mask[:, text : text + target] = False
        mask[text : text + target] = True
        return own(query, key, value, **options | {"attn_mask": mask})

    pipe = pipeline(folders[name])
    step = pipe.transformer.forward
    pipe.transformer.forward = lambda **given: step(**given | {"timestep": torch.tensor([timestep])})
    with pytest.MonkeyPatch.context() as patch:
        # The mask is set only when the transformer starts, because the text encoder before it must not be masked.
        pipe.transformer.register_forward_pre_hook(
            lambda *_: patch.setattr(F, "scaled_dot_product_attention", hidden), with_kwargs=False
        )
        expected = one_step(monkeypatch, pipe, shown, INSTRUCTIONS[0])
    kept = [i for i in range(text + target + target * len(shown)) if not text <= i < text + target]
    expected = {at: (k[:, kept], v[:, kept]) for at, (k, v) in expected.items()}
    assert largest_difference(prefix, editor, expected) <= 1e-5


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("name", "cameras", "layout"), CASES)
def test_described_rotations_equal_the_pipelines(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cameras: tuple[str, ...],
    layout: str,
    upright: bool,
    mode: str,
) -> None:
    """Text positions start after the larger side of the pictures. The Plus pipeline has no odd number of rows."""
    odd = (80, 48) if name == BASE else (WIDTH, HEIGHT)
    height, width = odd if upright else (HEIGHT, WIDTH)
    size = (height, width * len(cameras))
    settings = {"cameras": cameras, "camera_layout": layout, "image_size": size, "mode": mode}
    editor = load(folders, name, tuple(INSTRUCTIONS[:1]), **settings)
    blank = np.zeros((*size, 3), np.uint8)
    shown = np.split(blank, len(cameras), axis=1) if layout == "separate" else [blank]
    pipe, seen = pipeline(folders[name]), []
    pipe.transformer.pos_embed.register_forward_hook(lambda _m, _a, out: seen.append(out))
    one_step(monkeypatch, pipe, shown, INSTRUCTIONS[0])
    of_pictures, of_text = seen[0]
    if mode == "prefix":
        of_pictures = of_pictures[shown[0].shape[0] * shown[0].shape[1] // 256 :]
    expected, rope = torch.cat([of_text, of_pictures]), editor.spec.rope
    assert rope is not None
    for layer in editor.spec.layers:
        ids = layer_ids(layer)
        assert ids is not None
        assert torch.allclose(torch.complex(*tables(ids, rope)), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
@pytest.mark.parametrize(("name", "layout"), [(BASE, "tile"), (CLEAN, "separate")])
def test_a_batch_equals_its_rows_encoded_alone(folders: dict[str, Path], name: str, layout: str, mode: str) -> None:
    rows = pictures(2, ("top", "wrist"))
    settings = {"cameras": ("top", "wrist"), "camera_layout": layout, "mode": mode}
    editor, alone = load(folders, name, tuple(INSTRUCTIONS), **settings), load(folders, name, **settings)
    together = editor.encode(rows, INSTRUCTIONS)
    lengths = [editor.text_tokens(i) for i in INSTRUCTIONS]
    assert lengths[0] > lengths[1]
    assert together.valid is not None
    assert [layer.tokens for layer in editor.spec.layers] == [kv.k.shape[1] for kv in together.layers]
    for i, (row, instruction) in enumerate(zip(rows, INSTRUCTIONS, strict=True)):
        single = alone.encode([row], [instruction])
        assert (~together.valid[i]).nonzero()[:, 0].tolist() == list(range(lengths[i], lengths[0]))
        for one, both in zip(single.layers, together.layers, strict=True):
            for mine, theirs in ((one.k, both.k), (one.v, both.v)):
                assert torch.allclose(mine[0], theirs[i][together.valid[i]], atol=1e-5)
                assert not theirs[i][~together.valid[i]].any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (BASE, {"template": ("size", "scale")}),
        (PLUS, {"template": ("size", "scale")}),
        (PLUS, {"read": 192 * 192}),
    ],
)
def test_templates_and_sizes_from_diffusers_are_in_the_fingerprint(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    here = load(folders, name)
    before = here.fingerprint()
    (row,) = pictures(1)
    text = here.encode([row], INSTRUCTIONS[:1]).layers[0].k[:, :8]
    family = QwenImageEditPipeline if name == BASE else QwenImageEditPlusPipeline
    own = family.__init__

    def reworded(self: Any, *args: Any, **parts: Any) -> None:
        own(self, *args, **parts)
        self.prompt_template_encode = self.prompt_template_encode.replace(*change.get("template", ("", "")))

    monkeypatch.setattr(family, "__init__", reworded)
    if "read" in change:
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", change["read"])
    there = load(folders, name)
    assert not torch.equal(there.encode([row], INSTRUCTIONS[:1]).layers[0].k[:, :8], text)
    assert {key for key in before if there.fingerprint()[key] != before[key]} == {"recipe"}


def test_pictures_are_always_resized_with_pillow(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`AutoImageProcessor` would use torchvision if it is installed, which gives other pixels."""
    monkeypatch.setattr("transformers.models.auto.image_processing_auto.AutoImageProcessor.from_pretrained", None)
    assert isinstance(load(folders, BASE).part["processor"].image_processor, Qwen2VLImageProcessorPil)


def test_long_text_is_not_truncated(folders: dict[str, Path]) -> None:
    """The pipelines themselves allow 1024 tokens."""
    assert installed_editor(BASE).entry.defaults.max_text_tokens is None
    assert load(folders, BASE).text_tokens("go " * 1100) > 2 * 1024


def test_text_tokens_predicts_the_encoded_length(folders: dict[str, Path]) -> None:
    cameras = ("top", "left", "right")
    for name, layout in ((BASE, "tile"), (PLUS, "tile"), (PLUS, "separate")):
        editor = load(folders, name, cameras=cameras, camera_layout=layout, image_size=(80, 48 * 3))
        picture = np.zeros((80, 48 * 3, 3), np.uint8)
        for prompt in ("", "x", "  Put\tit {there}, 2 cm  left?  ", *INSTRUCTIONS):
            with torch.no_grad():
                assert len(editor.embed(prompt, picture).states) == editor.text_tokens(prompt)


@pytest.mark.parametrize("mode", ["prefix", "denoise"])
def test_chosen_segments_are_slices_of_the_whole_prefix(folders: dict[str, Path], mode: str) -> None:
    cameras = ("top", "wrist")
    settings = {"cameras": cameras, "camera_layout": "separate", "mode": mode}
    rows = pictures(1, cameras)
    whole = load(folders, PLUS, **settings)
    k = whole.encode(rows, ["go"]).layers[-1].k
    text = whole.text_tokens("go")
    at = {"text": slice(text), "reference": slice(-2 * TOKENS, None)}
    if mode == "denoise":
        at["target"] = slice(text, text + TOKENS)
    assert k.shape[1] == text + TOKENS * (2 + (mode == "denoise"))
    for segment, where in at.items():
        editor = load(folders, PLUS, segments=(segment,), **settings)
        assert torch.equal(editor.encode(rows, ["go"]).layers[-1].k, k[:, where])
        assert {(s.name, s.grid) for s in editor.spec.layers[0].segments} == {
            (segment, None if segment == "text" else (4, 6))
        }


@pytest.mark.parametrize(("timestep", "layout"), [(1.0, "separate"), (0.25, "separate"), (0.25, "tile")])
def test_the_target_is_the_first_picture_with_noise(folders: dict[str, Path], timestep: float, layout: str) -> None:
    cameras = ("top", "wrist")
    editor = load(folders, PLUS, mode="denoise", timestep=timestep, cameras=cameras, camera_layout=layout)
    given: dict[str, Any] = {}
    editor.denoiser.register_forward_pre_hook(lambda _m, _a, kwargs: given.update(kwargs), with_kwargs=True)
    editor.encode(pictures(2, cameras), INSTRUCTIONS)
    count = TOKENS * (1 if layout == "separate" else 2)
    target, reference = given["hidden_states"][:, :count], given["hidden_states"][:, count : 2 * count]
    noise = target_noise(target.shape, target)
    assert torch.equal(given["timestep"], torch.full((2,), timestep))
    assert torch.allclose(target, (1 - timestep) * reference + timestep * noise, atol=1e-6)


def test_actions_are_rotated_like_keys_at_unused_positions(folders: dict[str, Path]) -> None:
    editor = load(folders, PLUS)
    rope, shapes = editor.spec.rope, [(1, 4, 6)] * 4
    assert rope is not None
    with torch.no_grad():
        image, text = editor.denoiser.pos_embed([shapes], max_txt_seq_len=16, device=torch.device("cpu"))
    steps = torch.arange(-2, 2)
    # Positions count from the middle: a reference's second column is -2, its four rows are -2 to 1.
    rotary = Rotary(dataclasses.replace(rope, action_ids=(2, 0, -2)), steps)
    column = image.view(4, 4, 6, -1)[2, :, 1]
    assert torch.allclose(torch.complex(rotary.cos, rotary.sin), column, atol=1e-6)
    x = torch.randn(1, 4, 2, 16)
    assert torch.allclose(rotary(x), apply_rotary_emb_qwen(x, column, use_real=False), atol=1e-5)
    of_actions = Rotary(rope, torch.arange(16))
    actions = torch.complex(of_actions.cos, of_actions.sin)
    distances = (actions[:, None] - torch.cat([image, text])[None]).abs().amax(-1)
    assert distances.min() > 0.1


def test_described_token_counts_of_the_released_editors() -> None:
    """A picture of one megapixel has 64 x 64 latent tokens. Qwen2.5-VL uses one text token per 28 x 28 pixels."""
    two = {"cameras": ("top", "wrist")}
    for name, settings, text, references in (
        (BASE, {}, 37 * 37, [(64, 64)]),
        (PLUS, {}, 14 * 14, [(64, 64)]),
        (PLUS, {**two, "camera_layout": "separate"}, 2 * 14 * 14, [(64, 64), (64, 64)]),
        (CLEAN, {**two, "image_size": (512, 1024)}, 19 * 9, [(32, 64)]),
    ):
        spec = installed_editor(name).describe(PrefixOptions(**settings))  # type: ignore[arg-type]
        assert spec is not None
        assert len(spec.layers) == 60
        first, *rest = spec.layers[0].segments
        assert first.tokens == 32 + text
        assert [s.grid for s in rest] == references


def test_memory_is_the_sum_of_all_parts() -> None:
    kind = installed_editor(BASE)
    assert kind.memory_bytes() == 2 * sum(c.parameters for c in kind.entry.components.values())


@pytest.mark.parametrize(
    ("name", "settings", "message", "hint"),
    [
        (BASE, {"text_padding": "keep"}, "text padding 'keep' is not available for qwen-image-edit", "trim"),
        (BASE, {"camera_layout": "separate"}, "camera layout 'separate' is not available", "tile"),
        (PLUS, {"segments": ("target",)}, "has no target tokens", "text, reference"),
        (PLUS, {"image_size": (64, 90)}, "image size 64x90 does not split", "64x96"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(
    folders: dict[str, Path], name: str, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(folders, name, **settings)
    assert hint in (caught.value.hint or "")


def test_pictures_larger_than_the_position_table_are_refused(folders: dict[str, Path]) -> None:
    editor = load(folders, BASE, ("go",), image_size=(2048, 2048))
    with pytest.raises(UsageError, match="exceed the position ids of qwen-image-edit"):
        _ = editor.spec


@pytest.mark.parametrize(("name", "other"), [(BASE, PLUS), (PLUS, BASE)])
def test_a_folder_of_the_other_pipeline_is_refused(folders: dict[str, Path], name: str, other: str) -> None:
    with pytest.raises(EditorError, match=r"is a QwenImageEdit(Plus)?Pipeline folder, not a QwenImageEdit"):
        load({name: folders[other]}, name)

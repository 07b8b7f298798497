"""Check the plugin on a tiny folder: the contract of every editor, and the numbers of the pipeline itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LucyEditPipeline
from diffusers.pipelines.lucy import pipeline_lucy_edit
from imagewam_template.tiny import LATENTS, build
from PIL import Image
from torch import Tensor

from imagewam_cli.plugin import LayerSpec, RopeSpec, rotary_tables, rotate, target_noise
from imagewam_cli.testing.contract import EditorContract
from imagewam_cli.testing.subject import SHORT, Subject


class TestLucy(EditorContract):
    name = "lucy-edit"
    image_size = (64, 64)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(tmp_path_factory.mktemp("lucy"))

    def test_keys_and_values_are_those_of_the_pipelines_own_first_step(
        self, folder: Path, modes: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline_lucy_edit, "prompt_clean", str)  # it needs ftfy, and the prompt is clean
        subject = modes["denoise"]
        editor, pictures = subject.load(segments=subject.segments()), subject.pictures(1)
        seen = one_step(folder, Image.fromarray(pictures[0]["top"]), SHORT)
        spec = editor.spec
        assert [f"{layer.name}.to_v" for layer in spec.layers] == [name for name in seen if name.endswith("to_v")]
        for layer, kv in zip(spec.layers, editor.encode(pictures, [SHORT]).layers, strict=True):
            torch.testing.assert_close(kv.v.flatten(2), seen[f"{layer.name}.to_v"], atol=1e-5, rtol=1e-5)
            keys = rotated(seen[f"{layer.name}.norm_k"].unflatten(2, (layer.heads, -1)), layer, spec.rope)
            torch.testing.assert_close(kv.k, keys, atol=1e-5, rtol=1e-5)
            assert positions(layer) == [tuple(ids) for ids in layer.segments[0].position_ids.tolist()]

    def test_no_action_has_the_position_of_a_token(self, modes: dict[str, Subject]) -> None:
        spec = modes["denoise"].load().spec
        assert spec.rope is not None
        actions = {
            tuple(i if axis == spec.rope.action_axis else own for axis, own in enumerate(spec.rope.action_ids))
            for i in range(50)
        }
        assert not actions & {position for layer in spec.layers for position in positions(layer)}


def positions(layer: LayerSpec) -> list[tuple[int, int, int]]:
    """Return the (frame, row, column) of each target token."""
    (rows, columns) = layer.segments[0].grid or (0, 0)
    return [(0, row, column) for row in range(rows) for column in range(columns)]


def rotated(keys: Tensor, layer: LayerSpec, rope: RopeSpec | None) -> Tensor:
    """Rotate keys of shape (1, tokens, heads, D) by `rope`."""
    assert rope is not None
    return rotate(keys, *rotary_tables(torch.tensor(positions(layer)), rope.axes, rope.theta, "exact"))


def one_step(folder: Path, picture: Image.Image, prompt: str) -> dict[str, Tensor]:
    """Return the outputs of the self-attentions' `to_v` and `norm_k`, (1, tokens, channels), in the pipeline's only
    step, recorded with hooks of this test."""
    pipeline = LucyEditPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen: dict[str, Tensor] = {}
    for name, module in pipeline.transformer.named_modules():
        if name.endswith(("attn1.to_v", "attn1.norm_k")):
            module.register_forward_hook(lambda _m, _a, out, at=name: seen.update({at: out}))
    pipeline(
        [picture],
        prompt,
        height=picture.height,
        width=picture.width,
        num_frames=1,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=target_noise((1, LATENTS, 1, picture.height // 16, picture.width // 16), torch.zeros(1)),
        output_type="latent",
    )
    return seen

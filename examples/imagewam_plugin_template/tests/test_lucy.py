"""The plugin on a tiny folder: the promises of every editor, and the numbers of the pipeline itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LucyEditPipeline
from diffusers.pipelines.lucy import pipeline_lucy_edit
from imagewam_template.tiny import LATENTS, build
from PIL import Image
from torch import Tensor

from imagewam_cli.diffusers_editor import target_noise
from imagewam_cli.testing.contract import EditorContract
from imagewam_cli.testing.subject import SHORT, Subject


class TestLucy(EditorContract):
    name = "lucy-edit"
    image_size = (64, 64)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(tmp_path_factory.mktemp("lucy"))

    def test_values_are_those_of_the_pipelines_own_first_step(
        self, folder: Path, modes: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline_lucy_edit, "prompt_clean", str)  # it needs ftfy, and the prompt is clean
        subject = modes["denoise"]
        editor, pictures = subject.load(segments=subject.segments()), subject.pictures(1)
        expected = values_of_one_step(folder, Image.fromarray(pictures[0]["top"]), SHORT)
        assert [layer.name for layer in editor.spec.layers] == list(expected)
        for layer, kv in zip(editor.spec.layers, editor.encode(pictures, [SHORT]).layers, strict=True):
            torch.testing.assert_close(kv.v.flatten(2), expected[layer.name], atol=1e-5, rtol=1e-5)


def values_of_one_step(folder: Path, picture: Image.Image, prompt: str) -> dict[str, Tensor]:
    """Attention module -> V (1, tokens, channels) in the only step of the pipeline, without our recording."""
    pipeline = LucyEditPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen: dict[str, Tensor] = {}
    for name, module in pipeline.transformer.named_modules():
        attention, _, projection = name.rpartition(".")
        if projection == "to_v":
            module.register_forward_hook(lambda _m, _a, out, at=attention: seen.update({at: out}))
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

"""Encode an instruction and its pictures with Qwen2.5-VL, through diffusers' own pipeline.

The prompt template and the number of leading tokens that are dropped come from the pipeline. One argument that the
pipeline omits is added: which tokens represent pictures (`imagewam_cli.editors.text.picture_token_types`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from imagewam_cli.plugin import UInt8Image, picture_token_types
from imagewam_qwen.processor import picture_tokens

if TYPE_CHECKING:
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
    from transformers import Qwen2_5_VLForConditionalGeneration


class PromptReader:
    """Text-encoding half of a Qwen-Image-Edit pipeline."""

    def __init__(
        self, pipeline: QwenImageEditPipeline | QwenImageEditPlusPipeline, label: str, device: torch.device
    ) -> None:
        """pipeline: has a text encoder and a processor; label: text before the prompt, once per picture, in which
        `{}` is the picture's number; device: where the encoder computes, even if its weights are offloaded."""
        self._pipeline, self._label, self._device = pipeline, label, device
        pipeline.text_encoder.register_forward_pre_hook(_with_token_types, with_kwargs=True)

    @property
    def wording(self) -> dict[str, object]:
        """Prompt template and picture label, and the number of leading tokens that are dropped."""
        pipeline = self._pipeline
        return {
            "template": pipeline.prompt_template_encode,
            "dropped_tokens": pipeline.prompt_template_encode_start_idx,
            "picture_label": self._label,
        }

    def states(self, prompt: str, pictures: Sequence[UInt8Image], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the text states (L, D). pictures: uint8 (H, W, 3), each resized to its (height, width) in `sizes`."""
        resize = self._pipeline.image_processor.resize
        shown = [resize(Image.fromarray(p), *size) for p, size in zip(pictures, sizes, strict=True)]
        states: Tensor = self._pipeline.encode_prompt(prompt, image=shown, device=self._device)[0][0]
        return states

    def length(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the length L of `states` without running the encoder."""
        written = self.token_ids(prompt, len(sizes))
        # the template already has one token for each picture
        pictures = sum(picture_tokens(self._pipeline.processor.image_processor, size) - 1 for size in sizes)
        return len(written) - int(self._pipeline.prompt_template_encode_start_idx) + pictures

    def token_ids(self, prompt: str, pictures: int) -> list[int]:
        """Return the token ids of the prompt in the template, with one token for each picture."""
        labels = "".join(self._label.format(i + 1) for i in range(pictures))
        text = self._pipeline.prompt_template_encode.format(labels + prompt)
        ids: list[int] = self._pipeline.processor.tokenizer(text).input_ids
        return ids


def _with_token_types(
    encoder: Qwen2_5_VLForConditionalGeneration, args: tuple[object, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[object, ...], dict[str, Tensor]]:
    types = picture_token_types(kwargs["input_ids"], encoder.config.image_token_id)
    return args, {"mm_token_type_ids": types} | kwargs

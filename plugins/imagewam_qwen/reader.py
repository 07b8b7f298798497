"""How Qwen2.5-VL reads an instruction together with the pictures it is about: as diffusers' own pipeline asks it to.

The pipeline's template, and the number of leading tokens that it drops, are asked of the pipeline. One thing that it
leaves out is added: which tokens stand for pictures (`imagewam_cli.editors.text.picture_token_types`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagewam_cli.plugin import UInt8Image, picture_token_types
from imagewam_qwen.processor import picture_tokens


class PromptReader:
    """The half of a pipeline that reads."""

    def __init__(self, pipeline: Any, label: str, device: torch.device) -> None:
        """pipeline: with text encoder and processor; label: what it sets before the prompt for each picture, `{}` is
        the picture's number; device: where the encoder computes, wherever its weights wait."""
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
        """(L, D). pictures: uint8 (H, W, 3), each shown to the encoder at its (height, width) in `sizes`."""
        resize = self._pipeline.image_processor.resize
        shown = [resize(Image.fromarray(p), *size) for p, size in zip(pictures, sizes, strict=True)]
        states: Tensor = self._pipeline.encode_prompt(prompt, image=shown, device=self._device)[0][0]
        return states

    def length(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
        """L of `states`, told without the encoder."""
        processor = self._pipeline.processor
        labels = "".join(self._label.format(i + 1) for i in range(len(sizes)))
        written = processor.tokenizer(self._pipeline.prompt_template_encode.format(labels + prompt)).input_ids
        pictures = sum(picture_tokens(processor.image_processor, size) - 1 for size in sizes)  # one each is written
        return len(written) - int(self._pipeline.prompt_template_encode_start_idx) + pictures


def _with_token_types(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    types = picture_token_types(kwargs["input_ids"], encoder.config.image_token_id)
    return args, {"mm_token_type_ids": types} | kwargs

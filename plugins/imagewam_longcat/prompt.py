"""Prompt of LongCat-Image-Edit's vision-language model: a fixed preamble, the picture, the instruction.

The instruction is padded to 512 tokens. The denoiser receives the text states from the picture onwards: [start |
picture | end | instruction | padding]. The tokens that the pipeline adds after them are omitted: the model is causal,
so they do not affect the states that are used. Quoted text is tokenized letter by letter, because the editor was
trained to write it into pictures.

The preamble comes from diffusers' pipeline.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from imagewam_cli.plugin import PromptTokens, UInt8Image, picture_token_types

if TYPE_CHECKING:
    from transformers import (
        BatchFeature,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
        Qwen2VLImageProcessorPil,
    )

_START, _PICTURE = "<|vision_start|>", "<|image_pad|>"
_FRAME_TOKENS = 2
"""Number of tokens that mark the start and the end of the picture."""
_APOSTROPHE = re.compile("[a-zA-Z]+'[a-zA-Z]+")
_QUOTATION = re.compile("('[^']*'|\"[^\"]*\"|‘[^‘’]*’|“[^“”]*”)")


@dataclass(frozen=True, kw_only=True)
class LongCatPrompt:
    """The parts of a LongCat folder that encode text.

    max_tokens: length to which an instruction is truncated. device: where the encoder computes, even if its weights are
    offloaded.
    """

    tokenizer: Qwen2Tokenizer
    text_processor: Qwen2VLImageProcessorPil
    text_encoder: Qwen2_5_VLForConditionalGeneration
    max_tokens: int
    device: torch.device

    def instruction_ids(self, prompt: str) -> list[int]:
        """Return the token ids of an instruction without preamble and picture."""
        return list(self.prompt_tokens(prompt).ids)

    def prompt_tokens(self, prompt: str) -> PromptTokens:
        """Return the tokens of an instruction without preamble and picture, and the end that `max_tokens` cuts off."""
        ids = [i for piece in pieces(prompt) for i in self._ids(piece)]
        return PromptTokens(
            ids=tuple(ids[: self.max_tokens]), lost=self.tokenizer.decode(ids[self.max_tokens :]).strip()
        )

    def states(self, prompt: str, picture: UInt8Image, *, padded: bool) -> Tensor:
        """Return the hidden states (L, D) of picture and instruction. padded: include the states of the padding."""
        height, width = _encoder_size(picture.shape[:2])
        seen = self.text_processor(
            images=Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), return_tensors="pt"
        )
        placeholders = _PICTURE * _merged_tokens(self.text_processor, seen["image_grid_thw"].prod().item())
        before, instruction = self._ids(self.preamble.replace(_PICTURE, placeholders)), self.instruction_ids(prompt)
        padding = self.max_tokens - len(instruction) if padded else 0
        ids = [*before, *instruction, *[self.tokenizer.pad_token_id] * padding]
        valid = [i < len(before) + len(instruction) for i in range(len(ids))]
        return self._read(ids, valid, seen)[before.index(self.tokenizer.convert_tokens_to_ids(_START)) :]

    def _read(self, ids: Sequence[int], valid: Sequence[bool], seen: BatchFeature) -> Tensor:
        """Return the last hidden states (L, D) of all tokens."""
        device = self.device
        token_ids = torch.tensor([ids], device=device)
        states: Tensor = self.text_encoder.model(  # without the language head, which is never needed
            input_ids=token_ids,
            attention_mask=torch.tensor([valid], device=device).long(),
            mm_token_type_ids=picture_token_types(token_ids, self.tokenizer.convert_tokens_to_ids(_PICTURE)),
            pixel_values=seen["pixel_values"].to(device),
            image_grid_thw=seen["image_grid_thw"].to(device),
            use_cache=False,
        ).last_hidden_state[0]
        return states

    @functools.cached_property
    def preamble(self) -> str:
        """Text before the instruction, with one token for the picture."""
        from diffusers import LongCatImageEditPipeline

        pipeline = LongCatImageEditPipeline(
            scheduler=None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_processor=_NoProcessor(),
            transformer=None,
        )
        text: str = pipeline.prompt_template_encode_prefix
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


class _NoProcessor:
    """Stand-in for the processor; the pipeline's constructor reads one of its attributes."""

    image_processor = None


def pieces(prompt: str) -> Iterator[str]:
    """Split a prompt into pieces that are tokenized separately: each character of a quotation, including its marks, and
    the text between quotations. An apostrophe inside a word is not a quotation mark."""
    # diffusers' split_quotation is not used: it can swap two words with apostrophes, depending on the hash seed
    hidden = _APOSTROPHE.sub(lambda word: word[0].replace("'", "\0"), prompt)
    for i, part in enumerate(_QUOTATION.split(hidden)):
        part = part.replace("\0", "'")
        yield from part if i % 2 else filter(None, [part])


def picture_tokens(text_processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Return the number of text tokens of a picture of (height, width) pixels, with its start and end."""
    return _FRAME_TOKENS + _merged_tokens(
        text_processor, text_processor.get_number_of_image_patches(*_encoder_size(size), {})
    )


def _merged_tokens(text_processor: Qwen2VLImageProcessorPil, patches: int) -> int:
    """Return the number of tokens of a picture of `patches` patches, each square of which becomes one token."""
    side: int = text_processor.merge_size
    return patches // side**2


def _encoder_size(size: Sequence[int]) -> tuple[int, int]:
    """Return the (height, width) at which the text encoder sees a picture: half of the denoiser's."""
    return size[0] // 2, size[1] // 2

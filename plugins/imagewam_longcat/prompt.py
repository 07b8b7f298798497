"""How LongCat-Image-Edit puts a picture and an instruction to its vision-language model.

A fixed preamble, the picture, the instruction padded to 512 tokens. The states from the start of the picture on are the
text of the denoiser: [start | picture | end | instruction | padding]. What the pipeline puts behind them is left out:
the model is causal, so no state that is used can tell. What stands in quotation marks is tokenized letter by letter, so
that it can be written into a picture.

The preamble is read from diffusers' pipeline.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagewam_cli.plugin import UInt8Image, picture_token_types

_START, _PICTURE = "<|vision_start|>", "<|image_pad|>"
_FRAME_TOKENS = 2
"""Start and end of the picture."""
_APOSTROPHE = re.compile("[a-zA-Z]+'[a-zA-Z]+")
_QUOTATION = re.compile("('[^']*'|\"[^\"]*\"|‘[^‘’]*’|“[^“”]*”)")


@dataclass(frozen=True, kw_only=True)
class LongCatPrompt:
    """The parts of a LongCat folder that read. max_tokens: an instruction beyond is cut. device: where the encoder
    computes, wherever its weights wait."""

    tokenizer: Any
    text_processor: Any
    text_encoder: Any
    max_tokens: int
    device: torch.device

    def instruction_ids(self, prompt: str) -> list[int]:
        """Token ids of an instruction alone."""
        return [i for piece in pieces(prompt) for i in self._ids(piece)][: self.max_tokens]

    def states(self, prompt: str, picture: UInt8Image, *, padded: bool) -> Tensor:
        """Hidden states (L, D) of picture and instruction; padded: and of the padding after it."""
        height, width = _shown(picture.shape[:2])
        seen = self.text_processor(
            images=Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), return_tensors="pt"
        )
        shown = _PICTURE * _merged(self.text_processor, seen["image_grid_thw"].prod().item())
        before, instruction = self._ids(self.preamble.replace(_PICTURE, shown)), self.instruction_ids(prompt)
        padding = self.max_tokens - len(instruction) if padded else 0
        ids = [*before, *instruction, *[self.tokenizer.pad_token_id] * padding]
        valid = [i < len(before) + len(instruction) for i in range(len(ids))]
        return self._read(ids, valid, seen)[before.index(self.tokenizer.convert_tokens_to_ids(_START)) :]

    def _read(self, ids: Sequence[int], valid: Sequence[bool], seen: Any) -> Tensor:
        """Last hidden states (L, D) of all that is put to the model."""
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
        """What stands before an instruction, with one token for the picture."""
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
    """What the pipeline must be given to be made."""

    image_processor = None


def pieces(prompt: str) -> Iterator[str]:
    """What is tokenized apart: each letter of a quotation, its marks included, and all that stands between quotations.
    An apostrophe inside a word is no mark."""
    # not diffusers' split_quotation: of two words with apostrophes it may put one in the place of the other, by the
    # process's hash seed
    hidden = _APOSTROPHE.sub(lambda word: word[0].replace("'", "\0"), prompt)
    for i, part in enumerate(_QUOTATION.split(hidden)):
        part = part.replace("\0", "'")
        yield from part if i % 2 else filter(None, [part])


def seen_tokens(text_processor: Any, size: tuple[int, int]) -> int:
    """Text tokens of a picture of (height, width) pixels, its frame included."""
    return _FRAME_TOKENS + _merged(text_processor, text_processor.get_number_of_image_patches(*_shown(size), {}))


def _merged(text_processor: Any, patches: int) -> int:
    """Tokens of a picture of so many patches."""
    side: int = text_processor.merge_size
    return patches // side**2


def _shown(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) at which the model sees a picture: half of what the denoiser sees."""
    return size[0] // 2, size[1] // 2

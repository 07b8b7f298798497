"""What text encoders make of instructions: computed once each as far as memory allows, and padded row by row."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import TextToken
from imagewam_cli.errors import EditorError

_CPU = torch.device("cpu")
_REMEMBERED = 2**30
"""Bytes that are kept where any instruction may come."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: states (L, D); pooled (P,) where the denoiser also takes one vector for the whole text."""

    states: Tensor
    pooled: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of memory."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(self, device: torch.device) -> Prompt:
        """The same on another device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return dataclasses.replace(self, states=self.states.to(device), pooled=pooled)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A batch: embeds (B, L, D), valid bool (B, L) which is False where a shorter instruction was padded, pooled (B, P)
    where there is one."""

    embeds: Tensor
    valid: Tensor
    pooled: Tensor | None = None


def with_token(text: Text, token: TextToken) -> Text:
    """`text` cut or padded to `token.text_tokens`, with the token of each row at its place: L + 1 tokens."""
    length = text.valid.shape[1]
    room = token.text_tokens - length
    vectors = token.vectors.to(text.embeds)[:, None]
    embeds = torch.cat([F.pad(text.embeds, (0, 0, 0, room)), vectors], dim=1)
    valid = torch.cat([F.pad(text.valid, (0, room)), text.valid.new_ones(len(vectors), 1)], dim=1)
    if token.placement == "packed":
        order = torch.argsort((~valid).byte(), dim=1, stable=True)  # valid tokens, the new one last of them; padding
        embeds = embeds.gather(1, order[:, :, None].expand_as(embeds))
        valid = valid.gather(1, order)
    return dataclasses.replace(text, embeds=embeds, valid=valid)


def picture_token_types(ids: Tensor, picture: int) -> Tensor:
    """1 where a token of a vision-language model stands for a picture, else 0: int32, the shape of `ids`.

    picture: id of that token. transformers 5 gives a picture's tokens their rows and columns only where it is told
    which they are (`mm_token_type_ids`), and counts them like words otherwise; under version 4, with which editors were
    released, they had them. diffusers' pipelines leave it out (diffusers issue 14194).
    """
    return (ids == picture).int()


class TextStates:
    """The prompts of instructions, remembered in main memory, as batches on the device."""

    def __init__(
        self,
        embed: Callable[[str, UInt8Image | None], Prompt],
        tokens: Callable[[str], int],
        announced: Sequence[str],
        device: torch.device = _CPU,
    ) -> None:
        """tokens: how long the states of an instruction are; announced: all that a cache will ask for, empty where
        anything may come; device: of the batches."""
        self._device = device
        self._embed, self._tokens, self._announced = embed, tokens, dict.fromkeys(announced)
        self._known: OrderedDict[str, Prompt] = OrderedDict()
        self._complete = False

    def read_all(self, limit: int) -> bool:
        """Compute all announced instructions, if they take no more than `limit` bytes; the encoder may then go.

        False where they take more: the encoder must then stay, beside the denoiser, and the states that were used last
        are remembered, up to 1 GiB.
        """
        first = self._one(next(iter(self._announced)))
        if len(self._announced) * first.bytes > limit:
            return False
        self._complete = True  # nothing is forgotten from here on
        for instruction in self._announced:
            self._one(instruction)
        return True

    @functools.cached_property
    def longest(self) -> int:
        """Text tokens that a row of the announced instructions has room for."""
        return max(self._tokens(i) for i in self._announced or ("",))

    def of(self, instructions: Sequence[str], pictures: Sequence[UInt8Image] | None = None) -> Text:
        """A batch, padded to the longest announced instruction, or to its own longest if one was not announced.

        pictures: of the rows, where the encoder sees them; nothing is remembered then.
        """
        if pictures is None:
            rows = [self._one(i) for i in instructions]
        else:
            rows = [self._embed(i, picture) for i, picture in zip(instructions, pictures, strict=True)]
        lengths = [len(row.states) for row in rows]
        length = self.longest if self._announced.keys() >= set(instructions) else max(lengths)
        if length < max(lengths):
            raise EditorError(
                f"text_tokens told at most {length} tokens, embed gave {max(lengths)}",
                "correct the editor's text_tokens",
            )
        valid = [torch.arange(length, device=row.states.device) < n for row, n in zip(rows, lengths, strict=True)]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        embeds = torch.stack([F.pad(r.states, (0, 0, 0, length - n)) for r, n in zip(rows, lengths, strict=True)])
        return Text(
            embeds=embeds.to(self._device),
            valid=torch.stack(valid).to(self._device),
            pooled=torch.stack(pooled).to(self._device) if pooled else None,
        )

    def _one(self, instruction: str) -> Prompt:
        if instruction in self._known:
            self._known.move_to_end(instruction)
            return self._known[instruction]
        if self._complete and instruction not in self._announced:
            raise EditorError(
                f"the instruction {instruction!r} was not announced, and the text encoder is gone",
                "load the editor with all instructions, or with none",
            )
        prompt = self._embed(instruction, None).to(_CPU)
        self._known[instruction] = prompt
        while not self._complete and len(self._known) > 1 and len(self._known) * prompt.bytes > _REMEMBERED:
            self._known.popitem(last=False)
        return prompt

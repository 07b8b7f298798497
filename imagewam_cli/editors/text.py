"""Text states of instructions: encode each instruction once, as far as memory allows, and pad the rows of a batch."""

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
"""Bytes of text states that are kept if any instruction may come."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One encoded prompt."""

    states: Tensor
    """(L, D)."""
    pooled: Tensor | None = None
    """(P,), for denoisers that also take one vector for the whole text."""

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(self, device: torch.device) -> Prompt:
        """Return the prompt on another device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return dataclasses.replace(self, states=self.states.to(device), pooled=pooled)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A batch of encoded prompts."""

    embeds: Tensor
    """(B, L, D)."""
    valid: Tensor
    """bool (B, L), False where a shorter instruction was padded."""
    pooled: Tensor | None = None
    """(B, P), for denoisers that take it."""


def with_token(text: Text, token: TextToken) -> Text:
    """Cut or pad the text to `token.text_tokens`, and add each row's token where its placement says."""
    length = text.valid.shape[1]
    room = token.text_tokens - length
    vectors = token.vectors.to(text.embeds)[:, None]
    embeds = torch.cat([F.pad(text.embeds, (0, 0, 0, room)), vectors], dim=1)
    valid = torch.cat([F.pad(text.valid, (0, room)), text.valid.new_ones(len(vectors), 1)], dim=1)
    if token.placement == "packed":
        # a stable sort moves padding behind the valid tokens, the last of which is the new one
        order = torch.argsort((~valid).byte(), dim=1, stable=True)
        embeds = embeds.gather(1, order[:, :, None].expand_as(embeds))
        valid = valid.gather(1, order)
    return dataclasses.replace(text, embeds=embeds, valid=valid)


def picture_token_types(ids: Tensor, picture: int) -> Tensor:
    """Mark the tokens of a vision-language model that stand for a picture: 1 or 0, int32, in the shape of `ids`.

    picture: id of that token. transformers 5 gives a picture's tokens their rows and columns only if this mask
    (`mm_token_type_ids`) is passed, and otherwise counts them like words. Editors were released with version 4, which
    always gave them rows and columns. diffusers' pipelines do not pass the mask (diffusers issue 14194).
    """
    return (ids == picture).int()


class TextStates:
    """Encoded instructions, kept in main memory, and batches of them on the device."""

    def __init__(
        self,
        embed: Callable[[str, UInt8Image | None], Prompt],
        tokens: Callable[[str], int],
        announced: Sequence[str],
        device: torch.device = _CPU,
    ) -> None:
        """embed: encodes an instruction, and the picture if the encoder sees it; tokens: counts the states of an
        instruction; announced: all instructions of a cache, empty if any may come; device: where batches are put."""
        self._device = device
        self._embed, self._tokens, self._announced = embed, tokens, dict.fromkeys(announced)
        self._known: OrderedDict[str, Prompt] = OrderedDict()
        self._complete = False

    def read_all(self, limit: int) -> bool:
        """Encode all announced instructions, unless their states need more than `limit` bytes.

        Returns whether all are encoded, so that the encoder can be freed. If not, it must stay in memory beside the
        denoiser, and the most recently used states are kept, up to 1 GiB.
        """
        first = self._one(next(iter(self._announced)))
        if len(self._announced) * first.bytes > limit:
            return False
        self._complete = True  # from here on nothing is evicted
        for instruction in self._announced:
            self._one(instruction)
        return True

    @functools.cached_property
    def longest(self) -> int:
        """Number of text tokens of the longest announced instruction."""
        return max(self._tokens(i) for i in self._announced or ("",))

    def of(self, instructions: Sequence[str], pictures: Sequence[UInt8Image] | None = None) -> Text:
        """Return a batch, padded to the longest announced instruction, or to its own longest if one was not announced.

        pictures: one for each row, if the encoder sees them; the states are then not kept.
        """
        if pictures is None:
            rows = [self._one(i) for i in instructions]
        else:
            rows = [self._embed(i, picture) for i, picture in zip(instructions, pictures, strict=True)]
        lengths = [len(row.states) for row in rows]
        length = self.longest if self._announced.keys() >= set(instructions) else max(lengths)
        if length < max(lengths):
            raise EditorError(
                f"`text_tokens` counted at most {length} tokens, `embed` returned {max(lengths)}",
                "correct `text_tokens` in the editor's plugin",
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
                f"the instruction {instruction!r} was not announced, and the text encoder has been freed",
                "load the editor with all instructions, or with none",
            )
        prompt = self._embed(instruction, None).to(_CPU)
        self._known[instruction] = prompt
        # evict the least recently used, as if all states had the size of this one
        while not self._complete and len(self._known) > 1 and len(self._known) * prompt.bytes > _REMEMBERED:
            self._known.popitem(last=False)
        return prompt

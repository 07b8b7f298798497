"""Text states of instructions: encode each instruction once, as far as memory allows, and pad the rows of a batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import TextToken
from imagewam_cli.errors import EditorError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CPU = torch.device("cpu")
_MAX_CHECKED = 10_000
"""Maximum number of distinct instructions that `InstructionCheck` remembers."""
_MAX_CACHED_BYTES = 2**30
"""Maximum bytes of cached text states when instructions are not known in advance."""


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


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """The tokens that one tokenizer makes of a prompt."""

    ids: tuple[int, ...]
    """Ids that the text encoder reads, without padding."""
    lost: str = ""
    """End of the prompt that was cut off at the tokenizer's limit."""


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None, *, after: str = "") -> PromptTokens:
    """Return the tokens of `text`, at most `limit` of them with the tokenizer's special tokens; None: no limit.

    after: end of `text` that belongs to a template. Without it nothing of the prompt is lost.
    """
    # `verbose=False`: transformers would print a warning of its own
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    whole = tuple(encoded.input_ids)
    if limit is None or len(whole) <= limit:
        return PromptTokens(ids=whole)
    kept = tuple(tokenizer(text, truncation=True, max_length=limit).input_ids)
    # The last kept tokens may be special ones, which move to the new end. `kept` is shorter than `whole`.
    same = (one == other for one, other in zip(kept, whole[: len(kept)], strict=True))
    read = sum(itertools.takewhile(bool, same))
    if tokenizer.is_fast:
        position = encoded.offset_mapping[read - 1][1] if read else 0
        lost = text[position : len(text) - len(after)]
    else:
        lost = tokenizer.decode(whole[read:], skip_special_tokens=True)
    return PromptTokens(ids=kept, lost=lost.strip())


class InstructionCheck:
    """Compare instructions by what reaches the text encoders, so that two tasks never become one in silence."""

    def __init__(self, tokens: Callable[[str], Mapping[str, PromptTokens]]) -> None:
        """tokens: the tokens of an instruction, by the tokenizer's component."""
        self._tokens = tokens
        self._checked: set[str] = set()
        self._read_as: dict[tuple[tuple[int, ...], ...], str] = {}

    def require_distinct(self, instruction: str) -> None:
        """Check an instruction against all that were checked before. Warn if its end is cut off.

        Raises:
            EditorError: an instruction with other words has the same tokens.
        """
        if instruction in self._checked:
            return
        tokens = self._tokens(instruction)
        # What one tokenizer cuts off may still reach the denoiser through another.
        lost = min((found.lost for found in tokens.values()), key=len, default="")
        other = self._read_as.get(tuple(found.ids for found in tokens.values()), instruction)
        if _words(other) != _words(instruction):
            if lost:
                raise EditorError(
                    f"the text encoder reads the same of two instructions, because it cuts off their ends: "
                    f"{_excerpt(other)} and {_excerpt(instruction)}",
                    "shorten the instructions, or put what distinguishes them first",
                )
            raise EditorError(
                f"the tokenizer gives two instructions the same tokens: {_excerpt(other)} and {_excerpt(instruction)}",
                "its vocabulary is incomplete or belongs to another model; download the editor's weights again",
            )
        if lost:
            read = max(len(found.ids) for found in tokens.values())
            warn(
                f"the text encoder reads only the first {read} tokens of the instruction {_excerpt(instruction)}; "
                f"this end is lost: {_excerpt(lost, keep_end=True)}"
            )
        if len(self._checked) < _MAX_CHECKED:
            self._checked.add(instruction)
            self._read_as[tuple(found.ids for found in tokens.values())] = instruction


def _words(text: str) -> str:
    """Return the text without differences that tokenizers may ignore: case, white space, and forms of a character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _excerpt(text: str, length: int = 60, *, keep_end: bool = False) -> str:
    """Quote at most about `length` characters: the first ones and the last ten, or the last ones."""
    if len(text) <= length:
        return repr(text)
    return repr("..." + text[-length:] if keep_end else f"{text[: length - 10]}...{text[-10:]}")


def with_token(text: Text, token: TextToken) -> Text:
    """Truncate or pad the text to `token.text_tokens`, and add each row's token at its placement."""
    length = text.valid.shape[1]
    room = token.text_tokens - length
    vectors = token.vectors.to(text.embeds)[:, None]
    embeds = torch.cat([F.pad(text.embeds, (0, 0, 0, room)), vectors], dim=1)
    valid = torch.cat([F.pad(text.valid, (0, room)), text.valid.new_ones(len(vectors), 1)], dim=1)
    if token.placement == "packed":
        # a stable sort moves the padding after the valid tokens; the last valid token is the new one
        order = torch.argsort((~valid).byte(), dim=1, stable=True)
        embeds = embeds.gather(1, order[:, :, None].expand_as(embeds))
        valid = valid.gather(1, order)
    return dataclasses.replace(text, embeds=embeds, valid=valid)


def picture_token_types(ids: Tensor, picture: int) -> Tensor:
    """Mark the tokens of a vision-language model that stand for a picture: 1 or 0, int32, in the shape of `ids`.

    picture: id of that token. transformers 5 gives a picture's tokens their rows and columns only if this mask
    (`mm_token_type_ids`) is passed, and otherwise numbers them like words. Editors were released with version 4, which
    always gave them rows and columns. diffusers' pipelines do not pass the mask (diffusers issue 14194).
    """
    return (ids == picture).int()


class TextStates:
    """Encode instructions once, cache their states in main memory, and put batches of them on the device."""

    def __init__(
        self,
        embed: Callable[[str, UInt8Image | None], Prompt],
        tokens: Callable[[str], int],
        known: Sequence[str],
        device: torch.device = _CPU,
        check: Callable[[str], None] = lambda instruction: None,
    ) -> None:
        """
        Args:
            embed: encodes an instruction, and the picture if the encoder sees it.
            tokens: counts the states of an instruction.
            known: all instructions of a cache; empty if instructions are not known in advance.
            device: device of the batches.
            check: called with each instruction before it is encoded; raises an error if it cannot be used.

        Raises:
            EditorError: a known instruction fails the check.
        """
        self._device, self._check = device, check
        for instruction in known:
            check(instruction)
        self._embed, self._tokens, self._known = embed, tokens, dict.fromkeys(known)
        self._cached: OrderedDict[str, Prompt] = OrderedDict()
        self._complete = False

    def encode_all(self, limit: int) -> bool:
        """Encode all known instructions, unless their states need more than `limit` bytes.

        Returns whether all are encoded, so that the encoder can be freed. If not, it must stay in memory with the
        denoiser, and the most recently used states are kept, up to 1 GiB.
        """
        first = self._states_of(next(iter(self._known)))
        if len(self._known) * first.bytes > limit:
            return False
        self._complete = True  # from here on nothing is evicted
        for instruction in self._known:
            self._states_of(instruction)
        return True

    @functools.cached_property
    def longest(self) -> int:
        """Number of text tokens of the longest known instruction."""
        return max(self._tokens(i) for i in self._known or ("",))

    def batch(self, instructions: Sequence[str], pictures: Sequence[UInt8Image] | None = None) -> Text:
        """Return a batch, padded to the longest known instruction, or to its own longest if one is not known.

        pictures: one per row, if the encoder sees them; the states are then not cached.
        """
        for instruction in dict.fromkeys(instructions):
            self._check(instruction)
        if pictures is None:
            rows = [self._states_of(i) for i in instructions]
        else:
            rows = [self._embed(i, picture) for i, picture in zip(instructions, pictures, strict=True)]
        lengths = [len(row.states) for row in rows]
        length = self.longest if self._known.keys() >= set(instructions) else max(lengths)
        if length < max(lengths):
            raise EditorError(
                f"`text_tokens` counted at most {length} tokens, but `embed` returned {max(lengths)}",
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

    def _states_of(self, instruction: str) -> Prompt:
        if instruction in self._cached:
            self._cached.move_to_end(instruction)
            return self._cached[instruction]
        if self._complete and instruction not in self._known:
            raise EditorError(
                f"the instruction {instruction!r} was not passed to `load`, and the text encoder has been freed",
                "load the editor with all instructions, or with none",
            )
        prompt = self._embed(instruction, None).to(_CPU)
        self._cached[instruction] = prompt
        # evict the least recently used states, assuming that all are as large as this one
        while not self._complete and len(self._cached) > 1 and len(self._cached) * prompt.bytes > _MAX_CACHED_BYTES:
            self._cached.popitem(last=False)
        return prompt

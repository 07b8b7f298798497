"""`editors.text`: remembered text states are in main memory, batches on the device (here torch's `meta`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.text import InstructionCheck, Prompt, PromptTokens, TextStates, prompt_tokens
from imagewam_cli.errors import EditorError, ImagewamWarning
from tests.support.editors.instruct_pix2pix import byte_tokenizer

META = torch.device("meta")


def embed(instruction: str, picture: UInt8Image | None) -> Prompt:
    """Return one state per letter; every value is the number of letters."""
    n = len(instruction)
    return Prompt(states=torch.full((n, 3), float(n)), pooled=torch.full((2,), float(n)))


class Moved:
    """Create prompts that record the devices they are moved to."""

    def __init__(self) -> None:
        self.to: list[torch.device] = []

    def embed(self, instruction: str, picture: UInt8Image | None) -> Prompt:
        moved = self

        class OnDevice(Prompt):
            def to(self, device: torch.device) -> Prompt:
                moved.to.append(device)
                return super().to(device)

        return OnDevice(states=torch.zeros(len(instruction), 3))


def test_batches_are_on_the_device_and_remembered_states_in_main_memory() -> None:
    texts = TextStates(embed, len, ["ab", "abcd"], META)
    assert texts.encode_all(10**6)
    text = texts.batch(["ab", "abcd", "ab"])
    assert text.pooled is not None
    assert (text.embeds.device, text.valid.device, text.pooled.device) == (META, META, META)
    assert (text.embeds.shape, text.valid.shape, text.pooled.shape) == ((3, 4, 3), (3, 4), (3, 2))
    assert {p.states.device.type for p in texts._cached.values()} == {"cpu"}


def test_each_text_is_moved_to_main_memory_once() -> None:
    moved = Moved()
    texts = TextStates(moved.embed, len, [])
    texts.batch(["ab", "ab"])
    texts.batch(["ab"])
    assert moved.to == [torch.device("cpu")]


def test_a_batch_pads_its_rows() -> None:
    text = TextStates(embed, len, ["a", "abc"]).batch(["a", "abc"])
    assert text.embeds[:, :, 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert text.valid.tolist() == [[True, False, False], [True, True, True]]
    assert text.pooled is not None
    assert text.pooled[:, 0].tolist() == [1, 3]


def test_the_encoder_is_kept_if_the_states_need_more_memory() -> None:
    one = embed("abcd", None).bytes
    assert one == 4 * (4 * 3 + 2)
    kept = TextStates(embed, len, ["abcd", "efgh"])
    assert not kept.encode_all(2 * one - 1)
    assert kept.batch(["new one"]).valid.shape == (1, 7)
    freed = TextStates(embed, len, ["abcd", "efgh"])
    assert freed.encode_all(2 * one)
    with pytest.raises(EditorError, match="was not passed to `load`"):
        freed.batch(["new one"])


def letters(limit: int, *, ignores: str = "") -> Callable[[str], dict[str, PromptTokens]]:
    """Return a tokenizer of single letters, which reads at most `limit` of them and none of `ignores`."""

    def tokens(text: str) -> dict[str, PromptTokens]:
        ids = tuple(ord(letter) for letter in text.lower() if letter not in ignores)
        return {"tokenizer": PromptTokens(ids=ids[:limit], lost=text[limit:])}

    return tokens


def test_a_tokenizer_that_does_not_know_the_words_is_an_error() -> None:
    check = InstructionCheck(letters(20, ignores="lefrigh"))
    check.require_distinct("put it left")
    with pytest.raises(EditorError, match="gives two instructions the same tokens: 'put it left' and 'put it right'"):
        check.require_distinct("put it right")


@pytest.mark.parametrize("other", ["PUT IT LEFT", "put it  left", "put it left\n", "put it \uff4ceft"])
def test_spelling_that_tokenizers_ignore_is_the_same_instruction(other: str) -> None:
    check = InstructionCheck(lambda text: {"tokenizer": PromptTokens(ids=(1, 2))})
    check.require_distinct("put it left")
    check.require_distinct(other)


def test_a_lost_end_is_warned_of_once() -> None:
    check = InstructionCheck(letters(6))
    with pytest.warns(ImagewamWarning, match="reads only the first 6 tokens of the instruction 'put it left'"):
        check.require_distinct("put it left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.require_distinct("put it left")


def test_text_that_one_of_two_tokenizers_reads_is_not_lost(recwarn: pytest.WarningsRecorder) -> None:
    check = InstructionCheck(
        lambda text: {"short": letters(3)(text)["tokenizer"], "long": letters(99)(text)["tokenizer"]}
    )
    check.require_distinct("put it left")
    check.require_distinct("put it right")
    assert not recwarn.list


def test_the_lost_end_is_text_behind_the_limit() -> None:
    tokenizer = byte_tokenizer()
    text = "put the block on the zone and go on " * 3
    tokens = prompt_tokens(tokenizer, text, 77)
    assert len(tokens.ids) == 77
    assert tokens.ids == tuple(tokenizer(text, truncation=True, max_length=77).input_ids)
    # 75 letters are read, between the start and end tokens; spaces are no tokens
    assert tokens.lost.replace(" ", "") == text.replace(" ", "")[75:]
    assert text.strip().endswith(tokens.lost)
    assert prompt_tokens(tokenizer, text, None).lost == ""

"""`editors.text`: remembered text states are in main memory, batches on the device (here torch's `meta`)."""

from __future__ import annotations

import pytest
import torch

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.text import Prompt, TextStates
from imagewam_cli.errors import EditorError

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

"""Test `kvcache.format.frame_table`: the chunk that follows a frame, padded at the end of the episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.frame_table import FrameTable
from imagewam_cli.kvcache.reading.reader import CacheReader
from tests.support.arithmetic_cache import LENGTHS
from tests.support.arithmetic_editor import MemoryDataset


@pytest.fixture
def table(built: Path) -> FrameTable:
    return CacheReader(built).table


def test_a_chunk_is_the_actions_that_follow(table: FrameTable, dataset: MemoryDataset) -> None:
    expected = np.stack([row.action for row in dataset.rows(episodes=[1])])[3:7]
    chunk = table.chunk(1, 3, 4)
    np.testing.assert_array_equal(chunk.actions, expected)
    assert not chunk.is_pad.any()


def test_after_the_end_the_last_action_is_repeated_and_masked(table: FrameTable, dataset: MemoryDataset) -> None:
    actions = [row.action for row in dataset.rows(episodes=[2])]  # four frames
    chunk = table.chunk(2, 2, 5)
    np.testing.assert_array_equal(chunk.actions, np.stack([actions[2], *[actions[3]] * 4]))
    assert chunk.is_pad.tolist() == [False, False, True, True, True]


def test_a_chunk_has_no_actions_of_the_next_episode(table: FrameTable, dataset: MemoryDataset) -> None:
    for episode, length in enumerate(LENGTHS):
        own = {row.action.tobytes() for row in dataset.rows(episodes=[episode])}
        for frame in range(length):
            assert {action.tobytes() for action in table.chunk(episode, frame, 12).actions} <= own


def test_states_are_those_of_the_episode(table: FrameTable, dataset: MemoryDataset) -> None:
    np.testing.assert_array_equal(table.states_of(4), np.stack([row.state for row in dataset.rows(episodes=[4])]))


def test_an_unknown_episode_is_named(table: FrameTable) -> None:
    with pytest.raises(CacheError, match="no episode 5"):
        table.chunk(5, 0, 4)

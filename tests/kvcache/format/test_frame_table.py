"""Test `kvcache.format.frame_table`: the chunk that follows a frame, padded at the end of the episode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.data.types import FloatArray, Row
from imagewam_cli.errors import CacheError, ImagewamWarning
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.frame_table import FrameTable, warn_of_copies
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


def rows_with(dataset: MemoryDataset, state: FloatArray) -> Iterator[Row]:
    for i, row in enumerate(dataset.rows(images=False)):
        yield dataclasses.replace(row, state=state[i], action=row.action.astype(np.float64))


def test_float64_is_kept_only_where_float32_would_change_a_number(dataset: MemoryDataset, tmp_path: Path) -> None:
    millimeters = 4_500_000.0 + 0.001 * np.arange(2 * sum(LENGTHS)).reshape(-1, 2)
    table, _ = FrameTable.from_rows(rows_with(dataset, millimeters))
    (tmp_path / "table").write_bytes(table.to_bytes())
    read = FrameTable.load(tmp_path / "table", checksum_of(table.to_bytes()))
    np.testing.assert_array_equal(read.state, millimeters)
    # These actions were float32 before they became float64, so the file has the bytes that it always had.
    plain, _ = FrameTable.from_rows(dataset.rows(images=False))
    assert read.action.dtype == np.float32
    np.testing.assert_array_equal(read.action, plain.action)


def test_a_table_that_was_stored_rounded_is_recognized_by_its_checksum(dataset: MemoryDataset) -> None:
    table, _ = FrameTable.from_rows(rows_with(dataset, np.full((sum(LENGTHS), 2), 0.1)))
    rounded = dataclasses.replace(table, state=table.state.astype(np.float32))
    assert table.stored_as(checksum_of(rounded.to_bytes())).state.dtype == np.float32
    assert table.stored_as(checksum_of(table.to_bytes())) is table
    assert table.stored_as("") is table


def table_of(state: FloatArray, action: FloatArray) -> FrameTable:
    rows = (
        Row(row=i, episode=0, frame=i, timestamp=0.1 * i, instruction="go", state=state[i], action=action[i])
        for i in range(len(state))
    )
    return FrameTable.from_rows(rows)[0]


def test_dimensions_of_the_state_that_copy_the_action_are_found_and_warned_of() -> None:
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    state[:, 3], action[:, 2] = 1.0, 1.0  # constants are equal, but say nothing
    state[:, 1] = action[:, 0]
    table = table_of(state, action)
    assert table.copied_dimensions() == {1: 0}
    with pytest.warns(ImagewamWarning, match="1 of 4 dimensions of the state equal the action .*'b' = 'x'"):
        warn_of_copies(table, "abcd", "xyz")


def test_states_that_follow_the_action_later_are_not_copies() -> None:
    action = np.arange(12.0).reshape(6, 2)
    table = table_of(np.roll(action, 1, axis=0), action)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_copies(table, "ab", "xy")

"""Action chunks: which actions follow a frame, and the padding after the end."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.data.chunks import action_chunk
from imagewam_cli.errors import UsageError

ACTIONS = np.arange(10, dtype=np.float32).reshape(5, 2)


def test_a_chunk_inside_the_episode_is_a_slice() -> None:
    chunk = action_chunk(ACTIONS, 1, 3)
    assert chunk.actions.tolist() == ACTIONS[1:4].tolist()
    assert chunk.actions.dtype == np.float32
    assert chunk.is_pad.tolist() == [False, False, False]


def test_after_the_end_the_last_action_is_repeated_and_masked() -> None:
    chunk = action_chunk(ACTIONS, 3, 4)
    assert chunk.actions.tolist() == [[6, 7], [8, 9], [8, 9], [8, 9]]
    assert chunk.is_pad.tolist() == [False, False, True, True]


def test_the_last_frame_has_one_real_action() -> None:
    chunk = action_chunk(ACTIONS, 4, 2)
    assert chunk.actions.tolist() == [[8, 9], [8, 9]]
    assert chunk.is_pad.tolist() == [False, True]


def test_a_chunk_does_not_share_memory_with_the_actions() -> None:
    chunk = action_chunk(ACTIONS, 0, 2)
    chunk.actions[:] = -1
    assert ACTIONS[0, 0] == 0


@pytest.mark.parametrize(
    ("actions", "frame", "horizon", "message"),
    [
        (ACTIONS, 5, 2, "frame 5 is outside the episode of 5 frames"),
        (ACTIONS, -1, 2, "frame -1 is outside"),
        (ACTIONS, 0, 0, "a horizon of 0 actions is empty"),
        (ACTIONS[:0], 0, 1, "not those of an episode"),
        (ACTIONS[0], 0, 1, "not those of an episode"),
    ],
)
def test_invalid_arguments_are_refused(actions: np.ndarray, frame: int, horizon: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        action_chunk(actions, frame, horizon)

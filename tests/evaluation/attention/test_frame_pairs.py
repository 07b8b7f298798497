"""Test which pairs of frames are measured, and that their images are read."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.data.types import Dataset, EpisodeInfo
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.attention.frame_pairs import read_frame_pairs, spread_frame_pairs


def episodes(*lengths: int) -> list[EpisodeInfo]:
    return [EpisodeInfo(index=10 + i, length=n, first_row=0) for i, n in enumerate(lengths)]


def test_rows_are_spread_over_episodes_and_frames() -> None:
    pairs = spread_frame_pairs(episodes(*[50] * 100), 20, ahead=8)
    assert [m.episode for m in pairs] == [10 + 5 * i for i in range(20)]
    frames = sorted(m.frame for m in pairs)
    assert frames[0] < 5
    assert frames[-1] > 43
    assert max(np.diff(frames)) <= 5
    assert all(m.target == min(m.frame + 8, 49) for m in pairs)


def test_more_rows_than_episodes_are_spread_evenly() -> None:
    pairs = spread_frame_pairs(episodes(30, 40), 8, ahead=None)
    assert [m.episode for m in pairs] == [10] * 4 + [11] * 4
    assert len(set(pairs)) == 8
    assert {m.target for m in pairs} == {29, 39}


def test_the_last_frame_is_never_chosen_because_no_frame_follows() -> None:
    pairs = spread_frame_pairs(episodes(2, 1, 3), 50, ahead=4)
    assert {(m.episode, m.frame, m.target) for m in pairs} == {(10, 0, 1), (12, 0, 2), (12, 1, 2)}


def test_too_few_rows_or_episodes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"1 row\(s\) are too few"):
        spread_frame_pairs(episodes(5, 5), 1, ahead=1)
    with pytest.raises(UsageError, match=r"1 episode\(s\)"):
        spread_frame_pairs(episodes(5, 1), 4, ahead=1)


def test_the_images_are_those_of_the_chosen_frames(demonstrations: Dataset) -> None:
    pairs = spread_frame_pairs(demonstrations.episodes(), 7, ahead=5)
    every = {(row.episode, row.frame): row for row in demonstrations.rows()}
    read = list(read_frame_pairs(demonstrations, pairs))
    assert [(now.episode, now.frame, later.frame) for now, later in read] == [
        (m.episode, m.frame, m.target) for m in pairs
    ]
    for now, later in read:
        for row in (now, later):
            np.testing.assert_array_equal(row.images["top"], every[row.episode, row.frame].images["top"])

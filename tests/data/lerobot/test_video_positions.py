"""Test where episodes begin in an mp4: expected numbers are counted by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from imagewam_cli.data.lerobot.video_positions import Claim, Positions, find_positions


def claims(*declared: tuple[int, float, float]) -> list[Claim]:
    return [
        Claim(episode=number, length=length, start=start, end=end)
        for number, (length, start, end) in enumerate(declared)
    ]


def find(claims: Sequence[Claim], frames: int, times: Sequence[float] | None = None) -> Positions:
    return find_positions(claims, frames, lambda: np.array(range(frames) if times is None else times, dtype=float))


def test_offsets_that_fit_are_taken_without_a_remark() -> None:
    found = find(claims((5, 0, 5), (7, 5, 12), (4, 12, 16)), 16)
    assert found == Positions(first_frames={0: 0, 1: 5, 2: 12}, faults={}, remark=None)


@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_offsets_that_miss_by_a_fraction_of_a_frame_are_rounded(shift: float) -> None:
    found = find(claims((5, shift, 5 + shift), (7, 5 + shift, 12 + shift)), 12)
    assert found == Positions(first_frames={0: 0, 1: 5}, faults={}, remark=None)


@pytest.mark.parametrize(
    "declared",
    [
        # A merge did not reset the offsets for a new file.
        ((5, 12, 17), (7, 17, 24), (4, 24, 28)),
        # Each episode adds a fraction of a frame.
        ((5, 0, 5.4), (7, 5.4, 12.8), (4, 12.8, 17.2)),
        # The seconds are those of a file at another rate.
        ((5, 0, 10), (7, 10, 24), (4, 24, 32)),
    ],
)
def test_lengths_tell_the_positions_if_they_fill_the_file(declared: tuple[tuple[int, float, float], ...]) -> None:
    found = find(claims(*declared), 16)
    assert found.first_frames == {0: 0, 1: 5, 2: 12}
    assert not found.faults
    assert found.remark is not None
    assert "read by their lengths, which add up to its 16 frames" in found.remark


def test_an_episode_may_stand_before_an_earlier_one() -> None:
    found = find(claims((5, 7, 12), (7, 0, 7)), 12)
    assert found == Positions(first_frames={0: 7, 1: 0}, faults={}, remark=None)


def test_frames_of_nobody_are_skipped() -> None:
    within = find(claims((5, 0, 5), (4, 12, 16)), 16)
    assert within == Positions(first_frames={0: 0, 1: 12}, faults={}, remark=None)
    at_the_end = find(claims((5, 0, 5), (7, 5, 12)), 16)
    assert at_the_end.first_frames == {0: 0, 1: 5}
    assert at_the_end.remark == "ends with 4 frames that belong to no episode; they are ignored"


def test_drifting_offsets_are_refused_from_the_first_that_hits_no_frame() -> None:
    # Episode 4 falls on a frame again, but on the wrong one.
    drifting = claims((5, 0, 5.4), (5, 5.4, 10.8), (5, 10.8, 16.2), (5, 16.2, 21.6), (5, 21.6, 27))
    found = find(drifting, 30)
    assert found.first_frames == {0: 0}
    assert found.faults.keys() == {1, 2, 3, 4}
    assert "no frame at the offset of episode 1" in found.faults[4]


def test_a_file_that_ends_early_faults_the_episodes_beyond_its_end() -> None:
    found = find(claims((5, 0, 5), (7, 5, 12), (4, 12, 16)), 11)
    assert found.first_frames == {0: 0}
    assert found.faults == {
        1: "has 11 frames, but the episode needs frames 5 .. 11",
        2: "has 11 frames, but the episode needs frames 12 .. 15",
    }
    assert found.remark is not None
    assert found.remark.startswith("is 5 frames shorter than its episodes")


def test_a_hole_in_the_time_stamps_faults_its_episode_only() -> None:
    # Frames 7 and 8 were lost while recording; the time stamps of later frames are right.
    found = find(claims((5, 0, 5), (7, 5, 12), (4, 12, 16)), 14, [0, 1, 2, 3, 4, 5, 6, *range(9, 16)])
    assert found.first_frames == {0: 0, 2: 10}
    assert found.faults == {1: "has 5 frames for the 7 rows of the episode"}


def test_a_length_that_differs_from_the_declared_span_is_a_fault() -> None:
    found = find(claims((5, 0, 5), (7, 5, 10), (4, 10, 14)), 14)
    assert found.first_frames == {0: 0, 2: 10}
    assert found.faults == {1: "has 5 frames for the 7 rows of the episode"}


def test_overlapping_offsets_are_refused() -> None:
    found = find(claims((5, 0, 5), (7, 0, 7), (4, 12, 16)), 16)
    assert found.first_frames == {2: 12}
    assert "overlap" in found.faults[0]
    assert "overlap" in found.faults[1]

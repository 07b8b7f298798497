"""Find the first frame of each episode in an mp4 that holds many (v3), from their declared offsets and lengths.

Offsets are seconds inside the file. Tools that merge, cut and convert datasets leave offsets that were not reset, that
drift, or frames that belong to no episode. An episode gets a first frame only if it can have no other; all others get
a fault, because a picture paired with the wrong row is worse than a missing one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_OFF_FRAME = 0.3
"""Frames by which an offset may miss a frame. Sums of floating-point seconds miss by far less."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the episode table says about one episode in an mp4."""

    episode: int
    length: int
    """Rows of the episode."""
    start: float
    """Declared first frame in the file, not rounded."""
    end: float
    """Declared end in the file, in frames, not rounded."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where the episodes of one mp4 begin."""

    first_frames: Mapping[int, int]
    """episode -> number of its first frame in the file"""
    faults: Mapping[int, str]
    """episode -> why its frames cannot be told; continues a sentence that begins with the file's path"""
    remark: str | None
    """What is unusual about the file though its episodes can be read; continues the same sentence."""


def find_positions(claims: Sequence[Claim], frames: int, times: Callable[[], npt.NDArray[np.float64]]) -> Positions:
    """Return where the episodes of one mp4 begin.

    If the file has exactly as many frames as all its episodes have rows, there is no room for a gap, so the lengths
    tell every position. Otherwise the offsets must fall on frames.

    Args:
        claims: all episodes of the file, whether they will be read or not, ascending by episode.
        frames: number of frames in the file.
        times: returns the time of each frame in frames from the first, ascending; called only if it is needed.
    """
    ordered = sorted(claims, key=lambda claim: (claim.start, claim.episode))
    *by_length, total = itertools.accumulate((claim.length for claim in ordered), initial=0)
    if frames == total and _is_in_order(ordered):
        found = {claim.episode: start for claim, start in zip(ordered, by_length, strict=True)}
        moved = [claim.episode for claim in ordered if round(claim.start) != found[claim.episode]]
        remark = (
            f"does not have its episodes where the offsets in the episode table say (the first is episode {moved[0]}); "
            f"they are read by their lengths, which add up to its {frames} frames"
            if moved
            else None
        )
        return Positions(first_frames=found, faults={}, remark=remark)
    return _by_offsets(ordered, frames, times())


def _is_in_order(ordered: Sequence[Claim]) -> bool:
    """Return whether the order in the file is certain: offsets do not overlap, or agree with the episodes' order."""
    apart = all(before.start + before.length <= after.start + 0.5 for before, after in itertools.pairwise(ordered))
    alike = all(
        before.start < after.start and before.episode < after.episode for before, after in itertools.pairwise(ordered)
    )
    return apart or alike


def _by_offsets(ordered: Sequence[Claim], frames: int, times: npt.NDArray[np.float64]) -> Positions:
    found: dict[int, int] = {}
    faults: dict[int, str] = {}
    drifting: Claim | None = None
    for claim in ordered:
        first, stop = np.searchsorted(times, [claim.start - 0.5, claim.end - 0.5]).tolist()
        missed = times[first] - claim.start if first < frames else 0.0
        if drifting is None and abs(missed - round(missed)) > _OFF_FRAME:
            drifting = claim  # later offsets may have drifted by whole frames, which would not show
        if first == frames or claim.end > times[-1] + 1.5:
            needed = f"{round(claim.start)} .. {round(claim.start) + claim.length - 1}"
            faults[claim.episode] = f"has {frames} frames, but the episode needs frames {needed}"
        elif drifting is not None:
            faults[claim.episode] = (
                f"has no frame at the offset of episode {drifting.episode} in the episode table: the offsets "
                "(from_timestamp) do not fit this file"
            )
        elif round(missed) or stop - first != claim.length:
            faults[claim.episode] = f"has {stop - first} frames for the {claim.length} rows of the episode"
        else:
            found[claim.episode] = first
    for before, after in itertools.pairwise(ordered):
        if min(before.end, before.start + before.length) > after.start + 0.5:
            for claim, other in ((before, after), (after, before)):
                found.pop(claim.episode, None)
                faults[claim.episode] = (
                    f"would show the same frames in episodes {claim.episode} and {other.episode}: their offsets in the "
                    "episode table overlap"
                )
    end = max(claim.end for claim in ordered)
    return Positions(first_frames=found, faults=faults, remark=_remark(frames - round(end)))


def _remark(spare: int) -> str | None:
    if spare > 0:
        return f"ends with {spare} frames that belong to no episode; they are ignored"
    if spare < 0:
        return (
            f"is {-spare} frames shorter than its episodes; if they were lost before its end, the pictures of other "
            "episodes are shifted"
        )
    return None

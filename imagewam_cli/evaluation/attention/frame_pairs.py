"""Choose and read pairs of frames of recorded episodes: a frame, and a later one to compare it with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imagewam_cli.data.types import Dataset, EpisodeInfo, Row
from imagewam_cli.errors import UsageError

_GOLDEN = (5**0.5 - 1) / 2
"""Golden ratio: its first n multiples, modulo 1, are spread evenly over [0, 1) for every n."""


@dataclass(frozen=True, kw_only=True)
class FramePair:
    """A frame of an episode, and `target`, the later frame to compare it with."""

    episode: int
    frame: int
    target: int


def spread_frame_pairs(episodes: Sequence[EpisodeInfo], count: int, ahead: int | None) -> tuple[FramePair, ...]:
    """Return at most `count` different pairs, sorted by episode and frame.

    Episodes are evenly spaced and chosen equally often. Frames come from all parts of an episode, but never its
    last frame.

    ahead: distance to the target in frames, limited by the episode's end; None: the target is the last frame.

    Raises:
        UsageError: `count` is below 2, or fewer than two episodes have at least two frames.
    """
    usable = [e for e in episodes if e.length > 1]
    if count < 2:
        raise UsageError(f"{count} row(s) are too few: rows are compared with each other", "ask for at least two rows")
    if len(usable) < 2:
        raise UsageError(
            f"{len(usable)} episode(s) have two frames or more, but at least two are needed",
            "use a dataset with at least two such episodes",
        )
    shown = min(count, len(usable))
    spaced = [usable[i * len(usable) // shown] for i in range(shown)]
    pairs = set()
    for number in range(count):
        episode = spaced[number % shown]
        frame = int((0.5 + number * _GOLDEN) % 1 * (episode.length - 1))
        target = episode.length - 1 if ahead is None else min(frame + ahead, episode.length - 1)
        pairs.add(FramePair(episode=episode.index, frame=frame, target=target))
    return tuple(sorted(pairs, key=lambda pair: (pair.episode, pair.frame)))


def read_frame_pairs(dataset: Dataset, pairs: Sequence[FramePair]) -> Iterator[tuple[Row, Row]]:
    """Read the rows (now, target) of each pair, sorted by episode and frame.

    Holds the chosen frames of one episode in memory.
    """
    wanted: dict[int, list[FramePair]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.episode, pair.frame)):
        wanted.setdefault(pair.episode, []).append(pair)
    rows = dataset.rows(episodes=sorted(wanted))
    for index, of_episode in itertools.groupby(rows, key=lambda row: row.episode):
        frames = {frame for pair in wanted[index] for frame in (pair.frame, pair.target)}
        kept = {row.frame: row for row in of_episode if row.frame in frames}
        yield from ((kept[pair.frame], kept[pair.target]) for pair in wanted[index])

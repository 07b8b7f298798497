"""Pairs of frames of recorded episodes: what is seen now, and what will be seen later."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imagewam_cli.data.types import Dataset, EpisodeInfo, Row
from imagewam_cli.errors import UsageError

_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, fill [0, 1) evenly however many there are."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A frame of an episode and the later one that it is compared with."""

    episode: int
    frame: int
    target: int


def spread_moments(episodes: Sequence[EpisodeInfo], count: int, ahead: int | None) -> tuple[Moment, ...]:
    """At most `count` different moments in order of (episode, frame): evenly spaced episodes, each as often as any
    other, and frames from all parts of an episode but its last, after which nothing follows.

    ahead: frames to the target, which is never beyond the episode's end; None: the target is the episode's last frame.

    Raises:
        UsageError: fewer than two moments are asked for, or fewer than two episodes have two frames.
    """
    usable = [e for e in episodes if e.length > 1]
    if count < 2:
        raise UsageError(f"{count} row(s) are too few to compare rows with each other", "ask for at least two")
    if len(usable) < 2:
        raise UsageError(f"{len(usable)} episode(s) with two frames or more are too few", "two episodes are needed")
    shown = min(count, len(usable))
    spaced = [usable[i * len(usable) // shown] for i in range(shown)]
    moments = set()
    for number in range(count):
        episode = spaced[number % shown]
        frame = int((0.5 + number * _GOLDEN) % 1 * (episode.length - 1))
        target = episode.length - 1 if ahead is None else min(frame + ahead, episode.length - 1)
        moments.add(Moment(episode=episode.index, frame=frame, target=target))
    return tuple(sorted(moments, key=lambda m: (m.episode, m.frame)))


def read_moments(dataset: Dataset, moments: Sequence[Moment]) -> Iterator[tuple[Row, Row]]:
    """(now, target) of each moment, in order of (episode, frame). Memory: the wanted frames of one episode."""
    wanted: dict[int, list[Moment]] = {}
    for moment in sorted(moments, key=lambda m: (m.episode, m.frame)):
        wanted.setdefault(moment.episode, []).append(moment)
    rows = dataset.rows(episodes=sorted(wanted))
    for index, of_episode in itertools.groupby(rows, key=lambda row: row.episode):
        frames = {frame for m in wanted[index] for frame in (m.frame, m.target)}
        kept = {row.frame: row for row in of_episode if row.frame in frames}
        yield from ((kept[m.frame], kept[m.target]) for m in wanted[index])

"""Check the mp4s of the requested episodes before any frame is decoded, and tell where each episode begins in them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.data.lerobot.episode_faults import EpisodeFault
from imagewam_cli.data.lerobot.info import Info
from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.pixels import is_wide_gray
from imagewam_cli.data.lerobot.video_positions import Claim, Positions, find_positions
from imagewam_cli.data.lerobot.video_stream import VideoFacts, frame_times, read_facts
from imagewam_cli.errors import DatasetError, warn

_RATE_TOLERANCE = 0.01
"""Relative difference of frame rates that is not worth a word: 29.97 and 30 are the same camera."""
_THREADS = 8
"""Headers to read at the same time: network file systems answer many requests at once."""


@dataclass(frozen=True, kw_only=True)
class VideoCut:
    """The frames of one episode in one mp4: its frame 0 is frame `first_frame` of the file."""

    path: Path
    first_frame: int
    ends_file: bool
    """Whether the file ends with the episode."""


class VideoFiles:
    """The mp4s of one dataset, each examined once."""

    def __init__(self, info: Info, episodes: Sequence[Episode]) -> None:
        """episodes: all of the dataset, because they tell where the others in their mp4 are."""
        self._info = info
        self._episodes = episodes
        self._cuts: dict[Path, dict[int, VideoCut]] = {}
        self._faults: dict[Path, dict[int, EpisodeFault]] = {}
        self._claims: dict[str, Mapping[Path, Sequence[Claim]]] = {}

    def missing(self, episodes: Sequence[Episode], cameras: Sequence[str]) -> dict[int, EpisodeFault]:
        """Return a fault for each episode of which an mp4 does not exist."""
        faults: dict[int, EpisodeFault] = {}
        exists: dict[Path, bool] = {}
        for episode in episodes:
            for key in cameras:
                span = episode.videos.get(key)
                if span is None:
                    faults[episode.index] = self._without_position(key)
                    continue
                if span.path not in exists:
                    exists[span.path] = span.path.is_file()
                if not exists[span.path]:
                    faults[episode.index] = _missing(span.path)
        return faults

    def locate(
        self, episodes: Sequence[Episode], cameras: Sequence[str]
    ) -> tuple[dict[str, dict[int, VideoCut]], dict[int, EpisodeFault]]:
        """Return the cuts by feature key and episode, and a fault for each episode that lacks frames of a camera.

        Warns about files that can be read but are not as the metadata say.
        """
        self._examine_all(episodes, cameras)
        cuts: dict[str, dict[int, VideoCut]] = {key: {} for key in cameras}
        faults: dict[int, EpisodeFault] = {}
        for key in cameras:
            for episode in episodes:
                span = episode.videos.get(key)
                if span is None:
                    faults[episode.index] = self._without_position(key)
                elif episode.index in self._cuts[span.path]:
                    cuts[key][episode.index] = self._cuts[span.path][episode.index]
                else:
                    faults.setdefault(episode.index, self._faults[span.path][episode.index])
        return cuts, faults

    def _examine_all(self, episodes: Sequence[Episode], cameras: Sequence[str]) -> None:
        """Read the headers of all mp4s that were not examined yet, several at a time."""
        waiting = {
            span.path: key
            for key in cameras
            for span in (episode.videos.get(key) for episode in episodes)
            if span is not None and span.path not in self._cuts
        }
        if not waiting:
            return
        remarks: list[tuple[Path, str]] = []
        with ThreadPoolExecutor(_THREADS) as threads:
            for path, facts in zip(waiting, threads.map(_facts_or_fault, waiting), strict=True):
                remarks += [(path, text) for text in self._examine(path, self._claims_of(waiting[path])[path], facts)]
        _warn_once_of_each_kind(remarks)

    def _examine(self, path: Path, claims: Sequence[Claim], facts: VideoFacts | EpisodeFault) -> list[str]:
        """Find the cuts and faults of one mp4, and return what a person should know about it."""
        self._cuts[path], self._faults[path] = {}, {}
        if isinstance(facts, EpisodeFault):
            self._faults[path] = dict.fromkeys((claim.episode for claim in claims), facts)
            return []
        positions = self._positions(path, claims, facts)
        rate = self._rate_remark(facts)
        end = max((positions.first_frames.get(claim.episode, 0) + claim.length for claim in claims), default=0)
        for claim in claims:
            if claim.episode in positions.first_frames:
                first = positions.first_frames[claim.episode]
                self._cuts[path][claim.episode] = VideoCut(
                    path=path, first_frame=first, ends_file=first + claim.length == end == facts.frames
                )
            else:
                problem = f"the video {positions.faults[claim.episode]}{f' ({rate})' if rate else ''}"
                self._faults[path][claim.episode] = EpisodeFault(path=path, problem=problem)
        return [remark for remark in (positions.remark, rate) if remark]

    def _without_position(self, key: str) -> EpisodeFault:
        return EpisodeFault(
            path=self._info.root / "meta/episodes",
            problem=f"the episode table has no position in the videos of {key!r} (videos/{key}/...)",
        )

    def _positions(self, path: Path, claims: Sequence[Claim], facts: VideoFacts) -> Positions:
        if self._info.layout == "v2":  # the file belongs to one episode: a frame more or less may be anywhere in it
            (claim,) = claims
            if facts.frames != claim.length:
                problem = f"has {facts.frames} frames for the {claim.length} rows of the episode"
                return Positions(first_frames={}, faults={claim.episode: problem}, remark=None)
            return Positions(first_frames={claim.episode: 0}, faults={}, remark=None)
        return find_positions(claims, facts.frames, lambda: frame_times(path) * self._info.fps)

    def _rate_remark(self, facts: VideoFacts) -> str | None:
        declared = self._info.fps
        if facts.rate is None or facts.frames < 2 or abs(facts.rate - declared) <= _RATE_TOLERANCE * declared:
            return None
        return f"plays {facts.rate:g} frames per second, but meta/info.json declares {declared:g}"

    def _claims_of(self, key: str) -> Mapping[Path, Sequence[Claim]]:
        if key not in self._claims:
            found: defaultdict[Path, list[Claim]] = defaultdict(list)
            for episode in self._episodes:
                span = episode.videos.get(key)
                if span is not None:
                    found[span.path].append(
                        Claim(episode=episode.index, length=episode.length, start=span.start, end=span.end)
                    )
            self._claims[key] = found
        return self._claims[key]


def _warn_once_of_each_kind(remarks: Sequence[tuple[Path, str]]) -> None:
    """Warn of the first file with each kind of remark, and count the others."""
    kinds: defaultdict[str, list[tuple[Path, str]]] = defaultdict(list)
    for path, text in remarks:
        kinds[re.sub(r"\d+", "", text)].append((path, text))  # remarks of one kind differ in their numbers
    for (path, text), *others in kinds.values():
        warn(f"{path} {text}{f' (and {len(others)} more files like it)' if others else ''}")


def _missing(path: Path) -> EpisodeFault:
    return EpisodeFault(path=path, problem="the file is missing", missing=True)


def _facts_or_fault(path: Path) -> VideoFacts | EpisodeFault:
    if not path.is_file():
        return _missing(path)
    try:
        facts = read_facts(path)
        if is_wide_gray(facts.pix_fmt):
            return EpisodeFault(
                path=path,
                problem=f"the video holds one channel of more than 8 bits ({facts.pix_fmt}), not colors",
                hint="name color cameras with --camera",
            )
        return facts
    except DatasetError as error:
        problem = error.message.removeprefix(str(path)).removeprefix(":").strip()
        return EpisodeFault(path=path, problem=problem, hint=error.hint)

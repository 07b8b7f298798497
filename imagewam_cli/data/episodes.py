"""Choose episodes of a dataset by their numbers, and see the chosen ones as a dataset of their own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.data.dataset_files import files_of
from imagewam_cli.data.types import Dataset, DatasetInfo, EpisodeInfo, Row
from imagewam_cli.errors import DatasetError, UsageError

ONLY, EXCLUDE = "--only-episodes", "--exclude-episodes"
"""The options that hold a selection."""

Span = tuple[int, int]
"""First and last number of a range of episodes."""


@dataclass(frozen=True, kw_only=True)
class EpisodeSelection:
    """The episodes that the user chose: those of `only` (None: all) without those of `exclude`."""

    only: tuple[Span, ...] | None = None
    exclude: tuple[Span, ...] = ()

    @classmethod
    def of(
        cls, only: str | Iterable[int] | None = None, exclude: str | Iterable[int] | None = None
    ) -> EpisodeSelection:
        """Return a selection. Each argument is a text such as "0-9,12", or numbers; None: no restriction.

        Raises:
            UsageError: a text is not a list of numbers and ranges, or lists an episode twice; an excluded episode is
                not among the chosen ones; or every chosen episode is excluded.
        """
        chosen = None if only is None else _spans(only, ONLY)
        left_out = () if exclude is None else _spans(exclude, EXCLUDE)
        for first, last in left_out if chosen is not None else ():
            outside = next(_outside((first, last), chosen or ()), None)
            if outside is not None:
                raise UsageError(
                    f"{EXCLUDE} names episode {outside}, which is not among those of {ONLY} {_text(chosen or ())}",
                    f"omit it from {EXCLUDE}, or omit one of the two options",
                )
        if (
            chosen is not None
            and left_out
            and not any(next(_outside(span, left_out), None) is not None for span in chosen)
        ):
            raise UsageError(f"{EXCLUDE} leaves no episode of {ONLY} {_text(chosen)}", "exclude fewer episodes")
        return cls(only=chosen, exclude=left_out)

    @property
    def is_all(self) -> bool:
        """Whether nothing was chosen or excluded."""
        return self.only is None and not self.exclude

    def __contains__(self, episode: int) -> bool:
        """Return whether an episode is chosen, if it exists."""
        return (self.only is None or _holds(self.only, episode)) and not _holds(self.exclude, episode)

    def choose(self, existing: Sequence[int], root: Path) -> tuple[int, ...]:
        """Return the chosen ones of the episodes that exist, ascending. root: the dataset's folder, for messages.

        Raises:
            DatasetError: a chosen or excluded episode does not exist, or no episode is left.
        """
        known = sorted(existing)
        whole = spans_of(known)
        for option, spans in ((ONLY, self.only or ()), (EXCLUDE, self.exclude)):
            for span in spans:
                unknown = next(_outside(span, whole), None)
                if unknown is not None:
                    raise DatasetError(
                        f"{root} has no episode {unknown}, which {option} names",
                        f"it has {len(known)} episodes: {_text(whole)}",
                    )
        chosen = tuple(index for index in known if index in self)
        if not chosen:
            raise DatasetError(
                f"{EXCLUDE} leaves no episode of {root}", f"it has {len(known)} episodes: {_text(whole)}"
            )
        return chosen


ALL_EPISODES = EpisodeSelection()


def episodes_text(episodes: Iterable[int]) -> str:
    """Return numbers of episodes as the options take them, such as "0-9,12"."""
    return _text(spans_of(episodes), limit=None)


def spans_of(episodes: Iterable[int]) -> tuple[Span, ...]:
    """Return the ranges of consecutive numbers, ascending."""
    ordered = sorted(set(episodes))
    runs = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    grouped = [[number for _, number in run] for _, run in runs]
    return tuple((run[0], run[-1]) for run in grouped)


class SelectedDataset:
    """Some episodes of a dataset of any format, as a dataset. Rows are counted within these episodes."""

    def __init__(self, dataset: Dataset, selection: EpisodeSelection) -> None:
        """
        Raises:
            DatasetError: an episode does not exist, or none is left.
        """
        self._dataset = dataset
        every = dataset.episodes()
        chosen = set(selection.choose([episode.index for episode in every], dataset.info.root))
        self._episodes = renumbered([episode for episode in every if episode.index in chosen])
        self._first_rows = {episode.index: episode.first_row for episode in self._episodes}
        self._info = selected_info(dataset.info, self._episodes)

    @property
    def info(self) -> DatasetInfo:
        return self._info

    def episodes(self) -> Sequence[EpisodeInfo]:
        return self._episodes

    def rows(self, *, episodes: Sequence[int] | None = None, stride: int = 1, images: bool = True) -> Iterator[Row]:
        wanted = sorted(self._first_rows if episodes is None else set(episodes))
        for index in wanted:
            if index not in self._first_rows:
                raise DatasetError(
                    f"{self._info.root} has no episode {index} among the chosen ones",
                    f"it has {len(self._episodes)} of them: {self._info.selected}",
                )
        rows = self._dataset.rows(episodes=wanted, stride=stride, images=images)
        return (dataclasses.replace(row, row=self._first_rows[row.episode] + row.frame) for row in rows)

    def files(self, *, cameras: Sequence[str], episodes: Sequence[int] | None = None) -> Sequence[str] | None:
        """Return the files of the chosen episodes (`dataset_files.ListsFiles`); None if the format lists none."""
        return files_of(self._dataset, cameras, sorted(self._first_rows if episodes is None else episodes))


def renumbered(episodes: Sequence[EpisodeInfo]) -> tuple[EpisodeInfo, ...]:
    """Return the episodes with rows that are counted within them."""
    ends = itertools.accumulate(episode.length for episode in episodes)
    return tuple(
        dataclasses.replace(episode, first_row=end - episode.length)
        for episode, end in zip(episodes, ends, strict=True)
    )


def selected_info(info: DatasetInfo, episodes: Sequence[EpisodeInfo]) -> DatasetInfo:
    """Return the metadata of a dataset of which only these episodes are read."""
    if len(episodes) == info.total_episodes:
        return info
    return dataclasses.replace(
        info,
        total_episodes=len(episodes),
        total_rows=sum(episode.length for episode in episodes),
        selected=episodes_text(episode.index for episode in episodes),
    )


def _spans(value: str | Iterable[int], option: str) -> tuple[Span, ...]:
    """Parse the value of an option; return its ranges, ascending."""
    if not isinstance(value, str):
        numbers = list(value)
        if not numbers:
            raise UsageError(f"{option} names no episode", "name episodes, such as 0-9,12")
        return spans_of(numbers)
    spans = []
    for part in value.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise UsageError(f"{option} must look like 0-9,12, got {value!r}", "list numbers and ranges of episodes")
        spans.append((int(first), int(last) if dash else int(first)))
        if spans[-1][0] > spans[-1][1]:
            raise UsageError(f"{option}: the range {part.strip()} is reversed", f"write {last}-{first}")
    spans.sort()
    for before, after in itertools.pairwise(spans):
        if after[0] <= before[1]:
            raise UsageError(f"{option} lists episode {after[0]} twice: {value!r}", "list each episode once")
    return tuple(spans)


def _holds(spans: Iterable[Span], episode: int) -> bool:
    return any(first <= episode <= last for first, last in spans)


def _outside(span: Span, spans: Sequence[Span]) -> Iterator[int]:
    """Yield the first number of each gap that `spans`, which ascend, leave in `span`."""
    at, end = span
    for first, last in spans:
        if last < at:
            continue
        if first > end:
            break
        if first > at:
            yield at
        at = last + 1
    if at <= end:
        yield at


def _text(spans: Sequence[Span], limit: int | None = 8) -> str:
    """Return ranges as the options take them. limit: number of ranges after which a message ends with "..."."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:limit]]
    return ",".join(texts) + (", ..." if limit is not None and len(spans) > limit else "")

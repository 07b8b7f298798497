"""Split a dataset into training and validation by episode, because neighboring frames are nearly equal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from imagewam_cli.data.episodes import EpisodeSelection, episodes_text
from imagewam_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Split:
    """Numbers of the episodes that a run trains on and validates on, each ascending."""

    train: tuple[int, ...]
    validation: tuple[int, ...]

    def to_dict(self) -> dict[str, str]:
        """Return both as texts such as "0-9,12"; "" for none."""
        return {"train": episodes_text(self.train), "validation": episodes_text(self.validation)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Split:
        """Read what `to_dict` returned.

        Raises:
            UsageError, KeyError, TypeError, AttributeError: the values are damaged.
        """
        return cls(train=_numbers(values["train"]), validation=_numbers(values["validation"]))


def split_episodes(
    indices: Iterable[int],
    validation_fraction: float,
    seed: int,
    tasks: Mapping[int, Collection[Hashable]] | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split the episode indices into (train, validation), each ascending.

    The result depends only on the set of indices, the fraction, the seed and the tasks, not on their order nor on a
    random generator's version. Validation gets `round(n * validation_fraction)` of n episodes: at least one if n >= 2
    and the fraction is above 0, and never all of them.

    tasks: episode -> its tasks. Validation does not take the last episode of a task, and becomes smaller instead. If
        it would become empty, the tasks are ignored. None: the tasks are ignored.

    Raises:
        UsageError: the fraction is outside [0, 1), or an index occurs twice.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise UsageError(
            f"a validation fraction of {validation_fraction} is outside [0, 1)", "0.1 keeps a tenth for validation"
        )
    episodes = list(indices)
    twice = sorted(index for index, times in Counter(episodes).items() if times > 1)
    if twice:
        raise UsageError(f"episode {twice[0]} is listed twice", "list each episode once")

    # Rank by a digest instead of shuffling: the order is the same on every platform and Python version. An episode
    # keeps its rank when others are added, so a dataset that grows moves few episodes between the parts.
    ranked = sorted(episodes, key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    validation_size = 0
    if validation_fraction > 0.0 and len(episodes) >= 2:
        validation_size = min(max(1, round(len(episodes) * validation_fraction)), len(episodes) - 1)
    held_out = _sparing(ranked, validation_size, tasks or {}) or ranked[:validation_size]
    return tuple(sorted(set(episodes) - set(held_out))), tuple(sorted(held_out))


def _sparing(ranked: list[int], count: int, tasks: Mapping[int, Collection[Hashable]]) -> list[int]:
    """Return the first `count` episodes that leave every task another episode."""
    left = Counter(task for episode in ranked for task in set(tasks.get(episode, ())))
    taken: list[int] = []
    for episode in ranked:
        own = set(tasks.get(episode, ()))
        if len(taken) < count and all(left[task] > 1 for task in own):
            taken.append(episode)
            left.subtract(own)
    return taken


def _numbers(text: str) -> tuple[int, ...]:
    spans = EpisodeSelection.of(text).only if text else ()
    return tuple(number for first, last in spans or () for number in range(first, last + 1))

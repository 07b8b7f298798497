"""Split a dataset into training and validation by episode, because neighboring frames are nearly equal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from imagewam_cli.errors import UsageError


def split_episodes(
    indices: Iterable[int], validation_fraction: float, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split the episode indices into (train, validation), each ascending.

    The result depends only on the set of indices, the fraction and the seed, not on their order nor on a random
    generator's version. Validation gets `round(n * validation_fraction)` of n episodes: at least one if n >= 2 and the
    fraction is above 0, and never all of them.

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
    return tuple(sorted(ranked[validation_size:])), tuple(sorted(ranked[:validation_size]))

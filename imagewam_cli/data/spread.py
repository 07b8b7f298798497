"""Pick evenly spaced rows of a dataset, for measurements on a sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from imagewam_cli.data.types import Dataset, Row


def spread_rows(dataset: Dataset, *, episodes: int, rows: int, stride: int = 1) -> Iterator[Row]:
    """Yield up to `rows` evenly spaced rows from each of up to `episodes` evenly spaced episodes.

    Only every `stride`-th frame of an episode is considered.
    """
    wanted = spread_frames(dataset, episodes=episodes, rows=rows, stride=stride)
    stream = dataset.rows(episodes=sorted({episode for episode, _ in wanted}), stride=stride)
    return (row for row in stream if (row.episode, row.frame) in wanted)


def spread_frames(dataset: Dataset, *, episodes: int, rows: int, stride: int = 1) -> set[tuple[int, int]]:
    """Return the (episode, frame) pairs that `spread_rows` would yield, without reading the dataset."""
    every = dataset.episodes()
    count = min(episodes, len(every))
    return {
        (e.index, int(frame))
        for e in (every[i * len(every) // count] for i in range(count))
        for frame in np.linspace(0, (e.length - 1) // stride, rows).round().astype(int) * stride
    }

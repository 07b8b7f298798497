"""A few rows from all over a dataset, for what is measured on a sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from imagewam_cli.data.types import Dataset, Row


def spread_rows(dataset: Dataset, *, episodes: int, rows: int, stride: int = 1) -> Iterator[Row]:
    """At most `rows` rows of each of at most `episodes` episodes, evenly spaced in both; every `stride`-th counts."""
    every = dataset.episodes()
    count = min(episodes, len(every))
    shown = [every[i * len(every) // count] for i in range(count)]
    wanted = {
        (e.index, int(frame))
        for e in shown
        for frame in np.linspace(0, (e.length - 1) // stride, rows).round().astype(int) * stride
    }
    stream = dataset.rows(episodes=[e.index for e in shown], stride=stride)
    return (row for row in stream if (row.episode, row.frame) in wanted)

"""Compute the statistics that a LeRobot v3.0 dataset stores for each feature, per episode and over all episodes.

Numbers have one value per dimension. Images have one value per color channel, in 0..1, as [[[r]], [[g]], [[b]]] like
lerobot. lerobot averages the quantiles of the episodes; here the quantiles of the dataset come from its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.normalization import RunningStats
from imagewam_cli.data.types import UInt8Image

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_LARGE_PICTURE = 300
_REDUCED_PICTURE = 150

Statistics = dict[str, list[Any]]
"""statistic name -> values, ready for JSON and arrow"""


class PictureHistogram:
    """Count each byte value per color channel: exact statistics of any number of images in 6 KB."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._pictures = 0

    def add(self, picture: UInt8Image) -> None:
        """Count one image, uint8 (H, W, 3). Large images are thinned to about 150 pixels per side, as in lerobot."""
        longest = max(picture.shape[:2])
        step = longest // _REDUCED_PICTURE if longest >= _LARGE_PICTURE else 1
        thinned = picture[::step, ::step]
        for channel in range(3):
            self._counts[channel] += np.bincount(thinned[..., channel].ravel(), minlength=256)
        self._pictures += 1

    def merge(self, other: PictureHistogram) -> None:
        self._counts += other._counts
        self._pictures += other._pictures

    def result(self) -> Statistics:
        levels = np.arange(256) / 255.0
        seen = self._counts > 0
        shares = self._counts / self._counts.sum(axis=1, keepdims=True)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]) ** 2).sum(axis=1)
        cumulative = shares.cumsum(axis=1)
        result: Statistics = {
            "min": _per_channel(levels[seen.argmax(axis=1)]),
            "max": _per_channel(levels[255 - seen[:, ::-1].argmax(axis=1)]),
            "mean": _per_channel(mean),
            "std": _per_channel(np.sqrt(variance)),
            "count": [self._pictures],
        }
        for name, q in QUANTILES.items():
            # Without the margin, rounding of the cumulative sums could move a quantile to the next byte value.
            result[name] = _per_channel(levels[(cumulative >= q - 1e-12).argmax(axis=1)])
        return result


class DatasetStatistics:
    """Collect the statistics of the whole dataset, episode by episode, in bounded memory."""

    def __init__(self) -> None:
        self._vectors: dict[str, RunningStats] = {}
        self._pictures: dict[str, PictureHistogram] = {}

    def add(
        self, vectors: Mapping[str, npt.NDArray[Any]], pictures: Mapping[str, PictureHistogram]
    ) -> dict[str, Statistics]:
        """Add one episode (columns (L, D) and the pictures' histograms, by feature key) and return its statistics."""
        for key, histogram in pictures.items():
            self._pictures.setdefault(key, PictureHistogram()).merge(histogram)
        for key, values in vectors.items():
            self._vectors.setdefault(key, RunningStats(values.shape[1], name=key)).update(values)
        episode = {key: histogram.result() for key, histogram in pictures.items()}
        return episode | {key: _vector_statistics(values) for key, values in vectors.items()}

    def result(self) -> dict[str, Statistics]:
        """Return the statistics of all episodes so far, by feature key."""
        pictures = {key: histogram.result() for key, histogram in self._pictures.items()}
        return pictures | {key: _stream_statistics(stats) for key, stats in self._vectors.items()}


def _vector_statistics(values: npt.NDArray[Any]) -> Statistics:
    stats = RunningStats(values.shape[1], sample_rows=len(values))
    stats.update(values)
    return _stream_statistics(stats)


def _stream_statistics(stats: RunningStats) -> Statistics:
    low, high, mean, std = stats.moments()
    result: Statistics = {
        "min": low.tolist(),
        "max": high.tolist(),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "count": [stats.count],
    }
    for name, q in QUANTILES.items():
        result[name] = stats.quantile(q).tolist()
    return result


def _per_channel(values: Iterable[float]) -> list[list[list[float]]]:
    return [[[float(value)]] for value in values]

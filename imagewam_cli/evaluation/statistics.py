"""Success rates and means with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from imagewam_cli.errors import UsageError


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a success probability; (0, 1) without trials.

    Unlike the textbook interval p +- z sqrt(p (1 - p) / n), it stays in [0, 1] and has a non-zero width even at 0 and n
    successes.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        successes: from 0 to `trials`.
        trials: number of independent attempts.
        confidence: two-sided, between 0 and 1.

    Raises:
        UsageError: an argument is outside its range.
    """
    if not 0 <= successes <= trials:
        raise UsageError(f"{successes} successes in {trials} trials are impossible", "pass 0 <= successes <= trials")
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence must be between 0 and 1, got {confidence}", "pass a number such as 0.95")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    widening = 1 + z * z / trials
    center = (share + z * z / (2 * trials)) / widening
    half = z / widening * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Mathematically the two terms are equal at the ends, but they may differ in the last bit.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == trials else center + half
    return low, high


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A success rate in [0, 1] with its `wilson_interval` [low, high]. The rate is 0 without trials."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, trials: int, confidence: float = 0.95) -> Rate:
        """Compute the rate and its interval.

        Raises:
            UsageError: the counts or the confidence are impossible.
        """
        low, high = wilson_interval(successes, trials, confidence)
        rate = successes / trials if trials else 0.0
        return cls(successes=successes, trials=trials, rate=rate, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean with its bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float

    @classmethod
    def bootstrap(
        cls, values: Sequence[float], groups: Sequence[int], confidence: float = 0.95, resamples: int = 2000
    ) -> Mean:
        """Compute the mean of the values and its percentile interval, resampling whole groups with replacement.

        Groups (episodes) are independent, while values of one group (its rows) are similar. The random draws are the
        same in every call.

        Source: B. Efron, R. Tibshirani, "An introduction to the bootstrap" (1993), chapters 8 and 13.

        Raises:
            UsageError: `values` and `groups` differ in length, there are fewer than two groups, or the confidence is
                impossible.
        """
        if len(values) != len(groups) or len(set(groups)) < 2:
            raise UsageError(
                f"{len(values)} values in {len(set(groups))} group(s)", "pass values of at least two groups"
            )
        if not 0.0 < confidence < 1.0:
            raise UsageError(f"confidence must be between 0 and 1, got {confidence}", "pass a number such as 0.95")
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(member, weights=np.asarray(values, dtype=np.float64)), np.bincount(member)
        drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
        return cls(mean=float(sums.sum() / counts.sum()), low=float(low), high=float(high))

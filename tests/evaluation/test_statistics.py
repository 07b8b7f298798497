"""Compare Wilson intervals with published values and with the equation that defines them."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.config import from_dict, to_dict
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.statistics import Mean, Rate, wilson_interval

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(43, 50), (1, 3), (25, 50), (199, 200)])
def test_the_ends_solve_the_score_equation(successes: int, trials: int) -> None:
    """Both ends are the roots p of (rate - p)^2 = z^2 p (1 - p) / n."""
    share, q = successes / trials, Z * Z / trials
    roots = np.sort(np.roots([1 + q, -(2 * share + q), share * share]))
    assert wilson_interval(successes, trials) == pytest.approx(tuple(roots), abs=1e-12)


def test_the_interval_of_forty_three_of_fifty() -> None:
    assert wilson_interval(43, 50) == pytest.approx((0.7381, 0.9305), abs=5e-5)


def test_the_intervals_of_no_success_and_of_all_successes_are_mirror_images() -> None:
    """Without a success the upper end is z^2 / (n + z^2)."""
    assert wilson_interval(0, 50) == (0.0, pytest.approx(Z * Z / (50 + Z * Z), abs=1e-12))
    assert wilson_interval(50, 50) == (pytest.approx(50 / (50 + Z * Z), abs=1e-12), 1.0)


def test_without_trials_the_interval_is_zero_to_one() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert Rate.of(0, 0) == Rate(successes=0, trials=0, rate=0.0, low=0.0, high=1.0)


def test_more_confidence_gives_a_wider_interval() -> None:
    low, high = wilson_interval(30, 50)
    lower, higher = wilson_interval(30, 50, confidence=0.99)
    assert lower < low < 0.6 < high < higher


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(5, 4, 0.95), (-1, 4, 0.95), (1, 4, 1.0), (1, 4, 0.0)])
def test_impossible_arguments_are_refused(successes: int, trials: int, confidence: float) -> None:
    with pytest.raises(UsageError, match=r"impossible|confidence must be between 0 and 1"):
        wilson_interval(successes, trials, confidence)


def test_a_rate_survives_a_round_trip_through_plain_values() -> None:
    rate = Rate.of(43, 50)
    assert rate.rate == 0.86
    assert from_dict(Rate, to_dict(rate)) == rate


def test_the_bootstrap_of_many_values_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).exponential(size=400)
    found = Mean.bootstrap(values.tolist(), range(400))
    half = Z * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_repeated_values_within_a_group_do_not_narrow_the_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    once, thrice = Mean.bootstrap(values, [3, 1, 2, 9]), Mean.bootstrap(values * 3, [3, 1, 2, 9] * 3)
    assert from_dict(Mean, to_dict(thrice), source="memory") == thrice
    assert (once.mean, once.low, once.high) == pytest.approx((thrice.mean, thrice.low, thrice.high))
    assert Mean.bootstrap(values * 3, range(12)).high < thrice.high


def test_means_that_cannot_be_estimated_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 values in 1 group\(s\)"):
        Mean.bootstrap([1.0, 2.0], [5, 5])
    with pytest.raises(UsageError, match=r"2 values in 1 group\(s\)"):
        Mean.bootstrap([1.0, 2.0], [5])
    with pytest.raises(UsageError, match="confidence must be between 0 and 1, got 1"):
        Mean.bootstrap([1.0, 2.0], [1, 2], confidence=1)

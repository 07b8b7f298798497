"""Compare statistics with numpy over the whole array, and the normalizer with its formulas and its inverse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from imagewam_cli.data.normalization import (
    MODES,
    FieldStats,
    NormalizationMode,
    Normalizer,
    RunningStats,
    compute_stats,
)
from imagewam_cli.errors import DatasetError, UsageError


def stats_of(rows: np.ndarray) -> FieldStats:
    running = RunningStats(rows.shape[1])
    running.update(rows)
    return running.result()


def fixed(
    *, low: float, high: float, mean: float = 0.0, std: float = 1.0, q01: float = 0.0, q99: float = 1.0
) -> FieldStats:
    return FieldStats(min=(low,), max=(high,), mean=(mean,), std=(std,), q01=(q01,), q99=(q99,))


def test_statistics_equal_numpy_over_all_rows() -> None:
    # Far from zero a one-pass sum of squares would lose every digit of the standard deviation.
    rows = np.random.default_rng(0).normal(1e6, 0.01, size=(5000, 3))
    running = RunningStats(3)
    for start in range(0, 5000, 7):
        running.update(rows[start : start + 7])
    stats = running.result()
    assert running.count == 5000
    np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(stats.std, rows.std(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(stats.min, rows.min(axis=0))
    np.testing.assert_array_equal(stats.max, rows.max(axis=0))
    np.testing.assert_array_equal(stats.q01, np.quantile(rows, 0.01, axis=0))
    np.testing.assert_array_equal(stats.q99, np.quantile(rows, 0.99, axis=0))


def test_single_rows_and_blocks_give_the_same_statistics() -> None:
    rows = np.random.default_rng(1).normal(size=(300, 2)).astype(np.float32)
    one_by_one = RunningStats(2)
    for row in rows:
        one_by_one.update(row)
    assert one_by_one.result() == stats_of(rows)


def test_the_caller_may_overwrite_rows_after_adding_them() -> None:
    running, row = RunningStats(1), np.zeros(1)
    for value in (1.0, 3.0):
        row[0] = value
        running.update(row)
    assert running.result().mean == (2.0,)


def test_many_rows_use_bounded_memory_and_quantiles_sample_all_of_them() -> None:
    running = RunningStats(1, sample_rows=2000)
    for start in range(0, 40_000, 500):
        running.update(np.arange(start, start + 500, dtype=np.float64)[:, None])
    assert running._reservoir is not None
    assert running._reservoir.shape == (2000, 1)
    for q in (0.01, 0.5, 0.99):
        # With a sample of 2000 rows, the standard error of a rank is at most 1.1 %.
        assert abs(running.quantile(q)[0] / 40_000 - q) < 0.04
    assert running.result().max == (39_999.0,)


def test_compute_stats_takes_rows_of_both_fields() -> None:
    states, actions = np.arange(12.0).reshape(6, 2), np.arange(18.0).reshape(6, 3)
    state, action = compute_stats(zip(states, actions, strict=True))
    assert (state, action) == (stats_of(states), stats_of(actions))


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        compute_stats([])
    with pytest.raises(DatasetError, match="action: no rows"):
        RunningStats(2, name="action").result()


def test_a_row_of_another_dimension_is_refused_with_both_dimensions() -> None:
    with pytest.raises(DatasetError, match="state: got rows of 3 dimensions, expected 2"):
        RunningStats(2, name="state").update([1.0, 2.0, 3.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(DatasetError, match="NaN or infinite"):
        RunningStats(2).update([1.0, bad])


def test_min_max_maps_the_ends_to_minus_one_and_one() -> None:
    normalizer = Normalizer(mode="min_max", stats=fixed(low=-2.0, high=6.0))
    assert normalizer.scale.tolist() == [0.25]
    assert normalizer.offset.tolist() == [-0.5]
    assert normalizer.normalize([[-2.0], [2.0], [6.0]]).tolist() == [[-1.0], [0.0], [1.0]]


def test_quantile_mode_maps_the_quantiles_and_clamps_only_far_outliers() -> None:
    normalizer = Normalizer(mode="quantile", stats=fixed(low=-100, high=100, q01=-1.0, q99=1.0))
    assert normalizer.normalize([[1.0], [3.0], [100.0], [-100.0]])[:, 0].tolist() == [1.0, 3.0, 5.0, -5.0]


def test_mean_std_is_the_z_score() -> None:
    normalizer = Normalizer(mode="mean_std", stats=fixed(low=0, high=1, mean=3.0, std=2.0))
    np.testing.assert_allclose(normalizer.normalize([[3.0], [7.0], [23.0]])[:, 0], [0.0, 2.0, 5.0], atol=1e-7)


@pytest.mark.parametrize(("span", "scale"), [(0.0, 1.0), (0.99e-4, 1.0), (1.01e-4, 2 / 1.01e-4)])
def test_a_constant_dimension_is_shifted_only(span: float, scale: float) -> None:
    normalizer = Normalizer(mode="min_max", stats=fixed(low=0.0, high=span))
    assert normalizer.scale[0] == pytest.approx(scale)
    assert normalizer.offset[0] == pytest.approx(0.0 if scale == 1.0 else -1.0)
    shifted = Normalizer(mode="min_max", stats=fixed(low=7.0, high=7.0))
    assert shifted.normalize([7.5]).tolist() == [0.5]
    assert shifted.denormalize([0.5]).tolist() == [7.5]


def test_identity_neither_scales_nor_clamps() -> None:
    normalizer = Normalizer(mode="identity", stats=fixed(low=0, high=1))
    assert normalizer.normalize([[40.0]]).tolist() == [[40.0]]
    assert normalizer.denormalize([[40.0]]).tolist() == [[40.0]]


def test_denormalize_does_not_clamp() -> None:
    normalizer = Normalizer(mode="min_max", stats=fixed(low=-1.0, high=1.0))
    assert normalizer.denormalize([8.0]).tolist() == [8.0]


@given(
    rows=hnp.arrays(np.float32, (20, 3), elements=st.floats(-1e3, 1e3, width=32)),
    mode=st.sampled_from(MODES),
)
def test_denormalize_inverts_normalize(rows: np.ndarray, mode: NormalizationMode) -> None:
    normalizer = Normalizer(mode=mode, stats=stats_of(rows))
    normalized = normalizer.normalize(rows)
    assert normalized.dtype == np.float32
    back = normalizer.denormalize(normalized)
    inside = np.abs(normalized) < 5.0 if mode != "identity" else np.ones_like(rows, dtype=bool)
    # Rounding a normalised value of at most 5 to float32 has relative error 2**-24; scale that error back.
    tolerance = 1e-6 * np.abs(rows) + 5 * 2.0**-23 / normalizer.scale
    assert (np.abs(back.astype(np.float64) - rows) <= tolerance)[inside].all()


@given(rows=hnp.arrays(np.float32, (10, 2), elements=st.floats(-1e6, 1e6, width=32)), mode=st.sampled_from(MODES))
def test_the_json_round_trip_is_exact(rows: np.ndarray, mode: NormalizationMode) -> None:
    normalizer = Normalizer(mode=mode, stats=stats_of(rows))
    assert Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict()))) == normalizer


def test_values_of_another_dimension_are_refused_with_both_dimensions() -> None:
    normalizer = Normalizer(mode="min_max", stats=stats_of(np.eye(4)))
    for direction in (normalizer.normalize, normalizer.denormalize):
        with pytest.raises(DatasetError, match="values have 3 dimensions, but the normalizer has 4"):
            direction(np.zeros((2, 3)))


def test_an_unknown_mode_suggests_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        Normalizer(mode="minmax", stats=fixed(low=0, high=1))  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean 'min_max'?"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"mode": "other"}, "not a normalizer: mode 'other'"),
        ({"stats": None}, "statistics NoneType"),
        ({"stats": {"min": [0.0]}}, "the statistics lack max, mean, std, q01, q99"),
        ({"stats": {**fixed(low=0, high=1).to_dict(), "max": [1.0, 2.0]}}, "'max' has 2 dimensions, but 'min' has 1"),
        ({"stats": {**fixed(low=0, high=1).to_dict(), "std": [float("nan")]}}, "'std' is not finite"),
        ({"stats": {**fixed(low=0, high=1).to_dict(), "q01": "low"}}, "not lists of numbers"),
    ],
)
def test_a_damaged_file_is_refused(damage: dict[str, object], message: str) -> None:
    good = Normalizer(mode="min_max", stats=fixed(low=0, high=1)).to_dict()
    with pytest.raises(DatasetError, match=message):
        Normalizer.from_dict(good | damage)

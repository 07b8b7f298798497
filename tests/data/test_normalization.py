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
    constant_dimensions,
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
def test_the_absolute_rule_shifts_a_small_range_only(span: float, scale: float) -> None:
    """Policies made before the relative rule, and published checkpoints, act by these numbers."""
    normalizer = Normalizer(mode="min_max", stats=fixed(low=0.0, high=span), rule="absolute")
    assert normalizer.scale[0] == pytest.approx(scale)
    assert normalizer.offset[0] == pytest.approx(0.0 if scale == 1.0 else -1.0)
    assert normalizer.unscaled.tolist() == [scale == 1.0]
    shifted = Normalizer(mode="min_max", stats=fixed(low=7.0, high=7.0), rule="absolute")
    assert shifted.normalize([7.5]).tolist() == [0.5]
    assert shifted.denormalize([0.5]).tolist() == [7.5]


@pytest.mark.parametrize("rows", [[[0.3, -2e-5], [0.3, 3e-5]], [[1.0, 0.0], [2.0, 3.0]]])
@pytest.mark.parametrize("mode", MODES)
def test_the_absolute_rule_is_computed_as_before(rows: list[list[float]], mode: NormalizationMode) -> None:
    stats = stats_of(np.array(rows, np.float32))
    low, high = {"quantile": ("q01", "q99")}.get(mode, ("min", "max"))
    low, high = np.array(getattr(stats, low)), np.array(getattr(stats, high))
    if mode == "identity":
        scale, offset = np.ones(2), np.zeros(2)
    elif mode == "mean_std":
        scale = 1 / (np.array(stats.std) + 1e-8)
        offset = -np.array(stats.mean) * scale
    else:
        still = high - low < 1e-4
        scale = np.where(still, 1, 2 / np.where(still, 1, high - low))
        offset = np.where(still, -low, -1 - scale * low)
    normalizer = Normalizer.from_dict({"mode": mode, "stats": stats.to_dict()})
    assert normalizer.rule == "absolute"
    assert normalizer.to_dict() == {"mode": mode, "stats": stats.to_dict()}
    np.testing.assert_array_equal(normalizer.scale, scale)
    np.testing.assert_array_equal(normalizer.offset, offset)
    values = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    back = normalizer.denormalize(values)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, ((values.astype(np.float64) - offset) / scale).astype(np.float32))
    expected = values * scale + offset if mode == "identity" else np.clip(values * scale + offset, -5, 5)
    np.testing.assert_array_equal(normalizer.normalize(values), expected.astype(np.float32))


SCALED: tuple[NormalizationMode, ...] = ("min_max", "mean_std", "quantile")


@pytest.mark.parametrize("mode", SCALED)
@given(
    value=st.floats(-1e7, 1e7, allow_subnormal=False) | st.floats(-1e7, 1e7, width=32, allow_subnormal=False),
    predicted=st.floats(-1e6, 1e6),
    arriving=st.floats(-1e9, 1e9),
)
def test_a_constant_dimension_returns_its_constant(
    mode: NormalizationMode, value: float, predicted: float, arriving: float
) -> None:
    moving = np.linspace(-1, 1, 50)
    normalizer = Normalizer(mode=mode, stats=stats_of(np.stack([np.full(50, value), moving], axis=1)))
    assert normalizer.constant.tolist() == [True, False]
    assert normalizer.denormalize([predicted, 0.0])[0] == value
    assert normalizer.normalize([arriving, 0.0])[0] == 0


@pytest.mark.parametrize("mode", SCALED)
@pytest.mark.parametrize(
    ("center", "noise"), [(0.3, 1e-7), (-1.57, 3e-7), (90.0, 1e-6), (1000.0, 1e-5), (0.3, 1e-9)], ids=str
)
def test_rounding_around_a_constant_is_no_movement(mode: NormalizationMode, center: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    column = center + noise * rng.normal(size=500)
    for recorded in (column.astype(np.float32), column):
        rows = np.stack([recorded, rng.uniform(-90, 90, 500)], axis=1)
        normalizer = Normalizer(mode=mode, stats=stats_of(rows))
        assert normalizer.constant.tolist() == [True, False]
        assert abs(normalizer.denormalize([5.0, 0.0])[0] - center) <= 5 * noise
        # A difference that is small for the robot must not jump to the clamp.
        assert normalizer.normalize([center + 1e-3, 0.0])[0] == 0


@pytest.mark.parametrize("mode", SCALED)
@pytest.mark.parametrize(
    ("center", "reach"),
    [(0.0, 4e-5), (0.0, 1e-9), (1e-3, 4e-5), (0.3, 1e-3), (4.5e6, 5e-3), (4.5e6, 2.0), (48.137, 1e-5), (1e9, 1.0)],
    ids=str,
)
def test_a_small_movement_is_scaled(mode: NormalizationMode, center: float, reach: float) -> None:
    """Meters per step, millimeters in UTM coordinates, a meter in degrees of latitude."""
    rng = np.random.default_rng(0)
    column = center + rng.uniform(-reach, reach, 500)
    rows = np.stack([column, rng.uniform(-1, 1, 500)], axis=1)
    normalizer = Normalizer(mode=mode, stats=stats_of(rows))
    assert not normalizer.constant.any()
    normalized = normalizer.normalize(rows)
    assert np.ptp(normalized[:, 0]) > 1.9
    back = normalizer.denormalize(normalized)
    # float32 resolves the normalized value to 2**-24 of at most 3 reaches, float64 the recorded value to 2**-53.
    step = 2.0**-24 if normalizer.dtype is np.float32 else 2.0**-51
    assert np.abs(back - rows)[:, 0].max() < 1e-6 * reach + step * abs(center)
    assert step * abs(center) < 1e-4 * reach


def test_float32_coordinates_that_move_by_few_of_their_steps_still_move() -> None:
    rows = np.stack([4.5e6 + 0.5 * np.arange(8), np.linspace(-3, 3, 8)], axis=1).astype(np.float32)
    normalizer = Normalizer(mode="min_max", stats=stats_of(rows))
    assert not normalizer.constant.any()
    np.testing.assert_allclose(normalizer.denormalize(normalizer.normalize(rows))[:, 0], rows[:, 0], rtol=1e-13)


@given(
    rows=hnp.arrays(np.float64, (12, 3), elements=st.floats(-1e9, 1e9)),
    mode=st.sampled_from(SCALED),
    offset=st.sampled_from([0.0, 1.0, 4.5e6]),
)
def test_every_dimension_either_returns_its_constant_or_the_recorded_value(
    rows: np.ndarray, mode: NormalizationMode, offset: float
) -> None:
    rows = rows + offset
    normalizer = Normalizer(mode=mode, stats=stats_of(rows))
    back, size = normalizer.denormalize(normalizer.normalize(rows)).astype(np.float64), np.abs(rows).max(axis=0)
    spread = np.ptp(rows, axis=0)
    assert np.isfinite(back).all()
    # A constant is off by no more than the range that was taken for noise, which is small by every measure.
    assert (np.abs(back - rows)[:, normalizer.constant] <= spread[normalizer.constant]).all()
    assert (spread <= np.maximum(64 * 2.0**-23 * size, 2.0**-126))[normalizer.constant].all()
    inside = (np.abs(normalizer.normalize(rows)) < 5.0) & ~normalizer.constant
    step = 2.0**-24 if normalizer.dtype is np.float32 else 2.0**-48
    tolerance = 5 * 2.0**-23 / normalizer.scale + 2 * step * size
    assert (np.abs(back - rows) <= tolerance)[inside].all()


def test_a_constant_is_judged_beside_the_other_dimensions() -> None:
    # One step of float32: 0.5 m of a robot that moves by 3 m, or rounding beside counts of millions.
    for reach, expected in ((3.0, False), (1e6, True)):
        found = constant_dimensions(np.array([4.5e6, -reach]), np.array([4.5e6 + 0.5, reach]))
        assert found.tolist() == [expected, False]


def test_a_gripper_that_is_rarely_open_is_mapped_by_its_extremes_under_quantile() -> None:
    rows = np.zeros((1000, 2))
    rows[:5, 0], rows[:, 1] = 0.08, np.linspace(-1, 1, 1000)
    normalizer = Normalizer(mode="quantile", stats=stats_of(rows))
    assert normalizer.widened.tolist() == [True, False]
    assert normalizer.normalize(rows)[[0, 999], 0].tolist() == [1.0, -1.0]
    np.testing.assert_allclose(normalizer.denormalize([[1.0, 0.0]])[0, 0], 0.08)


def test_denormalized_values_are_float64_only_where_float32_would_round_them() -> None:
    moving = np.linspace(-1, 1, 50)
    for column, expected in (
        (moving, np.float32),
        (np.full(50, np.float32(1.57)), np.float32),
        (np.full(50, 1.57), np.float64),
        (4.5e6 + moving, np.float64),
        (1000 + 0.1 * moving, np.float64),
        (1 + moving, np.float32),
    ):
        normalizer = Normalizer(mode="min_max", stats=stats_of(np.stack([moving, column], axis=1)))
        assert normalizer.denormalize(np.zeros(2)).dtype == expected


def test_an_ordinary_field_has_the_same_map_under_both_rules() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    for mode in MODES:
        assert Normalizer(mode=mode, stats=stats_of(rows)).as_before
        still = rows.copy()
        still[:, 1] = 0.5
        assert Normalizer(mode=mode, stats=stats_of(still)).as_before == (mode == "identity")


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
    inside &= ~normalizer.constant
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
        ({"rule": "other"}, "unknown rule 'other' of a normalizer"),
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

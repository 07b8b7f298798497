"""Test `data.dimensions`: which dimensions are named, with which rows, and with which key of the recipe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewam_cli.data.dimensions import (
    FieldName,
    bulk_of,
    constant_values,
    inherited_faults,
    training_notes,
    unscaled_names,
)
from imagewam_cli.data.normalization import MODES, FieldStats, NormalizationMode, Normalizer, RunningStats

Column = npt.NDArray[np.float64]
RNG = np.random.default_rng(0)
UNIFORM = RNG.uniform(-1, 1, 1000)


def stats_of(rows: Column) -> FieldStats:
    running = RunningStats(rows.shape[1])
    running.update(rows)
    return running.result()


def notes(column: Column, mode: NormalizationMode, field: FieldName = "action") -> list[str]:
    """Return the notes on a dimension `arm` beside one that moves evenly."""
    rows = np.stack([column, np.linspace(-1, 1, len(column))], axis=1)
    normalizer = Normalizer(mode=mode, stats=stats_of(rows))
    return training_notes(field, ("arm", "even"), normalizer, rows, lambda row: f"row {row}")


def with_rows(column: Column, count: int, value: float) -> Column:
    """Return the column with `count` of its values replaced, from position 17 on."""
    return np.concatenate([column[:17], np.full(count, value), column[17 + count :]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", ["state", "action"])
def test_even_normal_and_binary_columns_need_no_note(mode: NormalizationMode, field: FieldName) -> None:
    for column in (UNIFORM, RNG.normal(size=1000), (UNIFORM > 0).astype(float), UNIFORM[:30], 4.5e6 + UNIFORM):
        assert notes(column, mode, field) == []


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "quantile"])
def test_constants_are_named_with_their_value(mode: NormalizationMode) -> None:
    still = np.full(1000, 1.57)
    assert notes(still, mode) == [
        "action 'arm' = 1.57: constant in the training rows; the policy always returns this value"
    ]
    assert notes(still, mode, "state") == ["state 'arm' = 1.57: constant in the training rows; the policy ignores it"]


def test_a_constant_action_without_normalization_is_named_with_the_key_that_returns_it() -> None:
    [note] = notes(np.full(1000, 1.57), "identity")
    assert "the model's error is added" in note
    assert "normalize_action=min_max" in note
    assert notes(np.full(1000, 1.57), "identity", "state") == []


def test_a_gripper_that_is_rarely_open() -> None:
    gripper = with_rows(np.zeros(1000), 5, 0.08)
    assert notes(gripper, "min_max") == []
    [note] = notes(gripper, "quantile")
    assert "action 'arm': 99 % of the rows are 0" in note
    assert "5 of 1000 rows (0.5 %, first: row 17) differ (0 to 0.08)" in note
    assert "normalize_action=min_max" in note
    [note] = notes(gripper, "mean_std")
    mean, std = gripper.mean(), gripper.std()
    assert (
        f"5 of 1000 rows (0.5 %, first: row 17) are beyond the clamp of mean_std and count as {mean + 5 * std:.4g}"
        in note
    )
    assert "0.08 was recorded; normalize_action=min_max keeps them" in note


def test_a_noisy_gripper_that_is_rarely_open_is_lost_under_quantile() -> None:
    gripper = with_rows(1e-4 * RNG.normal(size=1000), 5, -0.08)
    [note] = notes(gripper, "quantile", "state")
    assert "5 of 1000 rows (0.5 %, first: row 17) are beyond the clamp of quantile" in note
    assert "the policy sees no more, but -0.08 was recorded; normalize_state=min_max keeps them" in note


@pytest.mark.parametrize("count", [36, 300, 1000])
@pytest.mark.parametrize("mode", ["min_max", "mean_std"])
def test_one_outlier_is_named_with_its_row_and_what_it_leaves_to_the_others(
    mode: NormalizationMode, count: int
) -> None:
    column = with_rows(UNIFORM[:count], 1, 500.0)
    [note] = notes(column, mode)
    assert f"to 500 is that of 1 of {count} rows ({100 / count:.2g} %, first: row 17)" in note
    assert "0.4 % of it" in note or "0.39 % of it" in note
    assert "normalize_action=quantile" in note
    assert "--exclude-episodes" in note


def test_quantiles_ignore_one_outlier_unless_the_rows_are_few() -> None:
    assert notes(with_rows(UNIFORM, 1, 500.0), "quantile") == []
    [note] = notes(with_rows(UNIFORM[:36], 1, 500.0), "quantile")
    assert "1 of 36 rows" in note
    assert "--exclude-episodes" in note


def test_a_glitch_of_a_locked_joint_is_named_in_every_mode() -> None:
    for mode in ("min_max", "mean_std", "quantile"):
        [note] = notes(with_rows(np.zeros(1000), 1, 500.0), mode)  # type: ignore[arg-type]
        assert "1 of 1000 rows (0.1 %, first: row 17)" in note
        assert "--exclude-episodes" in note


def test_a_state_that_hardly_moves_is_named_with_the_difference_that_reaches_the_clamp() -> None:
    column = 1.57 + np.linspace(-1e-5, 1e-5, 1000)
    [note] = notes(column, "min_max", "state")
    assert "it hardly moves, 1.56999 to 1.57001" in note
    assert "a difference of 4e-05 is already at the clamp" in note
    assert notes(column, "min_max") == []  # an action stays within its range, however small


def test_float32_that_is_too_coarse_is_named() -> None:
    column = (4.5e6 + np.linspace(-2, 2, 1000)).astype(np.float32).astype(np.float64)
    [note] = notes(column, "min_max", "state")
    assert "recorded in steps of 0.5" in note
    assert "float64" in note


@given(st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=400))
def test_the_bulk_is_the_shortest_interval_without_one_percent_of_the_rows(values: list[float]) -> None:
    found = bulk_of(np.array(values))
    assert found is not None
    kept = len(values) - max(1, len(values) // 100)
    ordered = np.sort(values)
    shortest = min(ordered[i + kept - 1] - ordered[i] for i in range(len(values) - kept + 1))
    assert found.high - found.low == shortest
    assert len(found.far) <= len(values) - kept


def test_few_rows_have_no_bulk() -> None:
    assert bulk_of(np.arange(19.0)) is None


class TestOlderRule:
    """Policies made before the relative rule, and published checkpoints."""

    ROWS = np.stack([np.full(50, 1.57), np.linspace(-4e-5, 4e-5, 50), np.linspace(-1, 1, 50)], axis=1)

    @pytest.mark.parametrize("mode", ["min_max", "quantile"])
    def test_unscaled_actions_are_named(self, mode: NormalizationMode) -> None:
        names, normalizer = (
            ("locked", "slow", "free"),
            Normalizer(mode=mode, stats=stats_of(self.ROWS), rule="absolute"),
        )
        assert unscaled_names(names, normalizer) == ["locked", "slow"]
        assert constant_values(names, normalizer) == {}
        [fault] = inherited_faults("action", names, normalizer)
        assert "action 'locked' (1.57), 'slow' (-4e-05 to 4e-05)" in fault
        assert inherited_faults("state", names, normalizer) == []

    def test_states_that_jump_to_the_clamp_are_named(self) -> None:
        normalizer = Normalizer(mode="mean_std", stats=stats_of(self.ROWS), rule="absolute")
        [fault] = inherited_faults("state", ("locked", "slow", "free"), normalizer)
        assert "state 'locked' (1.57)" in fault
        assert "slow" not in fault
        assert inherited_faults("action", ("locked", "slow", "free"), normalizer) == []

    def test_the_relative_rule_has_no_such_faults(self) -> None:
        for mode in MODES:
            normalizer = Normalizer(mode=mode, stats=stats_of(self.ROWS))
            for field in ("state", "action"):
                assert inherited_faults(field, ("locked", "slow", "free"), normalizer) == []

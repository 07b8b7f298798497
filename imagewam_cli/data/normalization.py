"""Normalize states and actions: collect statistics in one pass, and map to the model's range and back.

The map is linear per dimension, `y = x * scale + offset`, and its forward direction ends with a clamp to [-5, 5]
(ImageWAM, arXiv 2606.19531: minimum/maximum for LIBERO, z-score for RoboTwin). A constant dimension is always 0 for the
model, and always its constant for the robot, whatever the model predicts. Pure numpy, in float64: only normalized
values are rounded to float32. Training normalizes and the policy denormalizes with the same object, so the two
directions are always consistent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import Float32Array, FloatArray
from imagewam_cli.errors import DatasetError, UsageError, nearest

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NormalizationMode = Literal["min_max", "mean_std", "quantile", "identity"]
"""min_max: [min, max] -> [-1, 1]; quantile: [q01, q99] -> [-1, 1]; mean_std: z-score; identity: unchanged."""

MODES: tuple[NormalizationMode, ...] = get_args(NormalizationMode)
CLAMP = 5.0
"""Normalized values are within [-CLAMP, CLAMP], so that one outlier cannot dominate a batch."""

Rule = Literal["relative", "absolute"]
"""Which dimensions are constant, and what becomes of them.

relative: judged by their magnitude and by the other dimensions (`constant_dimensions`); they return their constant.
absolute: policies made before this rule, and published checkpoints: a range below 1e-4 is shifted, but not scaled.
"""
RULES: tuple[Rule, ...] = get_args(Rule)

SMALLEST_RANGE = 1e-4
"""Rule `absolute`: a dimension with a smaller range is shifted only."""
STD_EPSILON = 1e-8
"""Added to a standard deviation, but at most `_STD_SHARE` of it under the rule `relative`."""
_STD_SHARE = 1e-4

_FLOAT32, _FLOAT64 = 2.0**-23, 2.0**-52
"""Distance between neighboring numbers, relative to their magnitude."""
_TINY = float(np.finfo(np.float32).tiny)

_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class FieldStats:
    """Statistics of one field over all rows, one number per dimension, in the field's own units."""

    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Population standard deviation (divided by the number of rows)."""
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in self.to_dict().items():
            if len(values) != self.dim:
                raise DatasetError(
                    f"statistic {name!r} has {len(values)} dimensions, but 'min' has {self.dim}",
                    "compute the statistics again from the dataset",
                )
            if not all(math.isfinite(value) for value in values):
                raise DatasetError(
                    f"statistic {name!r} is not finite: {list(values)}", "compute the statistics again from the dataset"
                )

    @property
    def dim(self) -> int:
        """Number of dimensions of the field."""
        return len(self.min)

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain values for JSON; `from_dict` restores exactly the same numbers."""
        return {
            "min": list(self.min),
            "max": list(self.max),
            "mean": list(self.mean),
            "std": list(self.std),
            "q01": list(self.q01),
            "q99": list(self.q99),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]]) -> FieldStats:
        """Read what `to_dict` returns; ignore other keys.

        Raises:
            DatasetError: a statistic is missing, of a different length or not finite.
        """
        missing = [name for name in ("min", "max", "mean", "std", "q01", "q99") if name not in data]
        if missing:
            raise DatasetError(
                f"the statistics lack {', '.join(missing)}", "compute the statistics again from the dataset"
            )
        try:
            return cls(
                min=_floats(data["min"]),
                max=_floats(data["max"]),
                mean=_floats(data["mean"]),
                std=_floats(data["std"]),
                q01=_floats(data["q01"]),
                q99=_floats(data["q99"]),
            )
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"the statistics are not lists of numbers: {error}", "compute the statistics again from the dataset"
            ) from error


class RunningStats:
    """Collect the statistics of one field from a stream of rows, in float64 and bounded memory.

    Minimum, maximum, mean and standard deviation are exact. Quantiles come from a sample of at most `sample_rows`
    rows: they are exact for up to that many rows; beyond that, they are estimated from a uniform sample drawn with a
    fixed seed (at 200,000 rows the 1 % quantile is off by 0.02 % of rank).
    """

    def __init__(self, dim: int, *, name: str = "field", sample_rows: int = 200_000) -> None:
        self.dim = dim
        self.name = name
        self._pending: list[Float64Array] = []
        self._pending_rows = 0
        self._count = 0
        self._min = np.full(dim, np.inf)
        self._max = np.full(dim, -np.inf)
        self._mean = np.zeros(dim)
        self._squares = np.zeros(dim)
        self._sample_rows = sample_rows
        self._sample: list[Float64Array] = []
        self._reservoir: Float64Array | None = None
        self._rng = np.random.default_rng(0)

    @property
    def count(self) -> int:
        """Number of rows added so far."""
        return self._count + self._pending_rows

    def update(self, values: npt.ArrayLike) -> None:
        """Add one row (D,) or a block of rows (N, D).

        Raises:
            DatasetError: D is not `dim` (names both), or a value is NaN or infinite.
        """
        rows = np.array(values, dtype=np.float64, ndmin=2)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise DatasetError(
                f"{self.name}: got rows of {rows.shape[-1]} dimensions, expected {self.dim}",
                "all rows of a dataset must have the same dimensions",
            )
        if not np.isfinite(rows).all():
            raise DatasetError(f"{self.name}: a value is NaN or infinite", "remove or repair that episode")
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows >= _BLOCK_ROWS:
            self._flush()

    def quantile(self, q: float) -> Float64Array:
        """Return the q-quantile (0 <= q <= 1) of each dimension, (D,), interpolated between neighboring rows.

        Raises:
            DatasetError: there were no rows.
        """
        self._require_rows()
        rows = self._reservoir if self._reservoir is not None else np.concatenate(self._sample)
        return np.asarray(np.quantile(rows, q, axis=0), dtype=np.float64)

    def moments(self) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Return (min, max, mean, population std), each (D,).

        Raises:
            DatasetError: there were no rows.
        """
        self._require_rows()
        return self._min.copy(), self._max.copy(), self._mean.copy(), np.sqrt(self._squares / self._count)

    def result(self) -> FieldStats:
        """Return the statistics of all rows so far.

        Raises:
            DatasetError: there were no rows.
        """
        low, high, mean, std = self.moments()
        return FieldStats(
            min=_floats(low),
            max=_floats(high),
            mean=_floats(mean),
            std=_floats(std),
            q01=_floats(self.quantile(0.01)),
            q99=_floats(self.quantile(0.99)),
        )

    def _require_rows(self) -> None:
        self._flush()
        if self._count == 0:
            raise DatasetError(
                f"{self.name}: no rows to compute statistics from", "the dataset or the selection is empty"
            )

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = np.concatenate(self._pending)
        self._pending, self._pending_rows = [], 0
        self._draw(rows)
        # Merging block moments (Chan et al. 1979) keeps full precision where sum-of-squares would cancel.
        block_mean = rows.mean(axis=0)
        block_squares = ((rows - block_mean) ** 2).sum(axis=0)
        total = self._count + len(rows)
        delta = block_mean - self._mean
        self._squares += block_squares + delta**2 * (self._count * len(rows) / total)
        self._mean += delta * (len(rows) / total)
        self._count = total
        self._min = np.minimum(self._min, rows.min(axis=0))
        self._max = np.maximum(self._max, rows.max(axis=0))

    def _draw(self, rows: Float64Array) -> None:
        """Update the sample by Vitter's algorithm R, a block at a time. Call before `_count` is increased."""
        room = max(0, self._sample_rows - self._count)
        if room:
            self._sample.append(rows[:room])
        late = rows[room:]
        if len(late) == 0:
            return
        if self._reservoir is None:
            self._reservoir, self._sample = np.concatenate(self._sample), []
        seen = self._count + min(room, len(rows)) + np.arange(len(late))
        slots = self._rng.integers(0, seen + 1)
        kept = slots < self._sample_rows
        self._reservoir[slots[kept]] = late[kept]


def compute_stats(rows: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> tuple[FieldStats, FieldStats]:
    """Return (state, action) statistics of a stream of pairs: state (S,) and action (A,), or blocks (N, S) and (N, A).

    Raises:
        DatasetError: the stream is empty, the number of dimensions changes, or a value is not finite.
    """
    gathered: tuple[RunningStats, RunningStats] | None = None
    for state, action in rows:
        if gathered is None:
            gathered = (
                RunningStats(np.shape(state)[-1], name="state"),
                RunningStats(np.shape(action)[-1], name="action"),
            )
        gathered[0].update(state)
        gathered[1].update(action)
    if gathered is None:
        raise DatasetError("there are no rows to compute statistics from", "the dataset or the selection is empty")
    return gathered[0].result(), gathered[1].result()


def constant_dimensions(low: Float64Array, high: Float64Array) -> BoolArray:
    """Return which dimensions, with minimum `low` and maximum `high` (D,), are constant: their range is noise.

    A range is compared with the magnitude of the values, so a range of 1e-5 around 0 is a movement, while one of 1e-7
    around 0.3 is rounding. It is also compared with the widest other dimension, or 1 if that is narrower, because
    coordinates of millions of meters have a small relative range. Constant is

    - a range that float32 or float64, whichever the values are, resolves too coarsely to tell movement from rounding;
    - a range below 64 roundings of float32 and a millionth of the other dimensions (1e-5 for float32 values).
    """
    spread, size = high - low, np.maximum(np.abs(low), np.abs(high))
    single = is_float32(low) & is_float32(high)
    others = np.maximum(_widest_others(spread), 1.0)
    rounding = np.where(single, 4 * _FLOAT32, 4096 * _FLOAT64) * size
    unresolved = (spread <= rounding) & (spread <= 1e-3 * others)
    negligible = np.where(single, 1e-5, 1e-6) * np.minimum(others, 100.0)
    return unresolved | ((spread <= 64 * _FLOAT32 * size) & (spread <= negligible)) | (spread < _TINY)


def is_float32(values: Float64Array) -> BoolArray:
    """Return which numbers float32 holds exactly."""
    with np.errstate(over="ignore"):
        return np.asarray(values == values.astype(np.float32), dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """The invertible map between robot units and the model's range, for one field.

    `denormalize(normalize(x)) == x` up to float32 rounding of the normalized value, wherever that was not clamped and
    the dimension is not constant.
    """

    mode: NormalizationMode
    stats: FieldStats
    rule: Rule = "relative"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"unknown normalization {self.mode!r}", nearest(self.mode, MODES))

    @property
    def dim(self) -> int:
        """Number of dimensions of the field."""
        return self.stats.dim

    @cached_property
    def scale(self) -> Float64Array:
        """Factor of each dimension, (D,), never zero; 1 for a constant dimension."""
        return self._scale_and_offset[0]

    @cached_property
    def offset(self) -> Float64Array:
        """Summand of each dimension, (D,)."""
        return self._scale_and_offset[1]

    @cached_property
    def constant(self) -> BoolArray:
        """Dimensions that return their constant, (D,). There are none under the rule `absolute` or in mode identity."""
        if self.rule == "absolute" or self.mode == "identity":
            return np.zeros(self.dim, dtype=np.bool_)
        return constant_dimensions(np.array(self.stats.min), np.array(self.stats.max))

    @cached_property
    def constants(self) -> Float64Array:
        """The value of each dimension if it were constant, (D,): the mean, which is the value itself if all are equal.

        Float32 values have a float32 constant.
        """
        low, high = np.array(self.stats.min), np.array(self.stats.max)
        middle = np.clip(np.array(self.stats.mean), low, high)
        return np.where(is_float32(low) & is_float32(high), _rounded(middle), middle)

    @cached_property
    def widened(self) -> BoolArray:
        """Dimensions of mode quantile that are mapped by their minimum and maximum, (D,).

        Their quantiles are equal, but their values are not: nearly all rows have one value, and the others matter.
        """
        if self.rule == "absolute" or self.mode != "quantile":
            return np.zeros(self.dim, dtype=np.bool_)
        return constant_dimensions(np.array(self.stats.q01), np.array(self.stats.q99)) & ~self.constant

    @cached_property
    def unscaled(self) -> BoolArray:
        """Dimensions that the rule `absolute` shifts only, (D,): the model's error reaches the robot as it is."""
        stats = self.stats
        if self.rule == "absolute" and self.mode == "min_max":
            return np.asarray(np.array(stats.max) - np.array(stats.min) < SMALLEST_RANGE, dtype=np.bool_)
        if self.rule == "absolute" and self.mode == "quantile":
            return np.asarray(np.array(stats.q99) - np.array(stats.q01) < SMALLEST_RANGE, dtype=np.bool_)
        return np.zeros(self.dim, dtype=np.bool_)

    @property
    def dtype(self) -> type[np.float32] | type[np.float64]:
        """Precision of denormalized values: float32, unless it would round a constant or one of 2**14 steps of a range.

        Under the rule `absolute`, and in mode identity, it is float32.
        """
        if self.rule == "absolute" or self.mode == "identity":
            return np.float32
        low, high = np.array(self.stats.min), np.array(self.stats.max)
        step = _FLOAT32 * np.maximum(np.abs(low), np.abs(high))
        coarse = np.where(self.constant, ~is_float32(self.constants), step > (high - low) / 2**14)
        return np.float64 if coarse.any() else np.float32

    @property
    def as_before(self) -> bool:
        """Whether the rule `absolute` gives the same map, so that an older imagewam acts the same."""
        return self.same_map(Normalizer(mode=self.mode, stats=self.stats, rule="absolute"))

    def same_map(self, other: Normalizer) -> bool:
        """Return whether both normalizers give the same numbers."""
        return (
            (self.mode == "identity") == (other.mode == "identity")
            and self.dtype is other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.constant, other.constant)
            and np.array_equal(self.constants[self.constant], other.constants[other.constant])
        )

    def normalize(self, values: npt.ArrayLike) -> Float32Array:
        """Map (..., D) from robot units to float32, clamped to [-5, 5]; "identity" changes nothing.

        Constant dimensions are 0.

        Raises:
            DatasetError: the last axis is not D (names both numbers).
        """
        x = self._require_dim(values)
        if self.mode == "identity":
            return x.astype(np.float32)
        y = np.clip(x * self.scale + self.offset, -CLAMP, CLAMP)
        return np.where(self.constant, 0.0, y).astype(np.float32)

    def denormalize(self, values: npt.ArrayLike) -> FloatArray:
        """Map normalized (..., D) to robot units, without clamping, in the precision `dtype`.

        Constant dimensions return their constant, whatever `values` are.

        Raises:
            DatasetError: the last axis is not D (names both numbers).
        """
        x = (self._require_dim(values) - self.offset) / self.scale
        return np.where(self.constant, self.constants, x).astype(self.dtype)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; `from_dict` restores an equal normalizer."""
        values: dict[str, object] = {"mode": self.mode, "stats": self.stats.to_dict()}
        return values if self.rule == "absolute" else values | {"rule": self.rule}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Normalizer:
        """Read what `to_dict` returns; ignore other keys. Without a rule, it is `absolute`.

        Raises:
            DatasetError: `mode` or `stats` is missing or damaged, or the rule is unknown.
        """
        stats, named = data.get("stats"), data.get("rule", "absolute")
        rule = next((rule for rule in RULES if rule == named), None)
        if rule is None:
            raise DatasetError(f"unknown rule {named!r} of a normalizer", "upgrade imagewam")
        for mode in MODES:
            if data.get("mode") == mode and isinstance(stats, Mapping):
                return cls(mode=mode, stats=FieldStats.from_dict(stats), rule=rule)
        raise DatasetError(
            f"not a normalizer: mode {data.get('mode')!r}, statistics {type(stats).__name__}",
            f"expected 'mode' (one of {', '.join(MODES)}) and 'stats'",
        )

    @cached_property
    def _scale_and_offset(self) -> tuple[Float64Array, Float64Array]:
        shifted = self.unscaled if self.rule == "absolute" else self.constant
        low, high = np.array(self.stats.min), np.array(self.stats.max)
        match self.mode:
            case "min_max":
                return _to_unit_range(low, high, shifted)
            case "quantile":
                low = np.where(self.widened, low, np.array(self.stats.q01))
                high = np.where(self.widened, high, np.array(self.stats.q99))
                return _to_unit_range(low, high, shifted)
            case "mean_std":
                std, epsilon = np.array(self.stats.std), np.full(self.dim, STD_EPSILON)
                if self.rule == "relative":
                    std = np.where(std > 0, std, (high - low) / 2)  # squares of tiny numbers are 0
                    epsilon = np.minimum(epsilon, _STD_SHARE * std)
                scale = 1.0 / np.where(shifted, 1.0, std + epsilon)
                return scale, -np.array(self.stats.mean) * scale
            case "identity":
                return np.ones(self.dim), np.zeros(self.dim)

    def _require_dim(self, values: npt.ArrayLike) -> Float64Array:
        x = np.asarray(values, dtype=np.float64)
        got = x.shape[-1] if x.ndim else 0
        if got != self.dim:
            raise DatasetError(
                f"values have {got} dimensions, but the normalizer has {self.dim}",
                "use the dataset and robot that the statistics were computed on",
            )
        return x


def _to_unit_range(low: Float64Array, high: Float64Array, shifted: BoolArray) -> tuple[Float64Array, Float64Array]:
    """Return scale and offset that map [low, high] to [-1, 1]; `shifted` dimensions are shifted to 0, unscaled."""
    scale = np.where(shifted, 1.0, 2.0 / np.where(shifted, 1.0, high - low))
    return scale, np.where(shifted, -low, -1.0 - scale * low)


def _widest_others(spread: Float64Array) -> Float64Array:
    """Return the widest spread of the other dimensions for each of (D,); 0 if there is no other."""
    if len(spread) < 2:
        return np.zeros(len(spread))
    second, first = np.sort(spread)[-2:]
    widest = np.full(len(spread), first)
    widest[np.argmax(spread)] = second
    return widest


def _rounded(values: Float64Array) -> Float64Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float64)


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)

"""Say in words what a normalizer does to single dimensions: constants, clamped rows, outliers.

Training and `info` name them, and loading a policy names those that carry the model's error to the robot as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.normalization import CLAMP, BoolArray, Float64Array, Normalizer, is_float32
from imagewam_cli.data.types import FloatArray

FieldName = Literal["state", "action"]

_FEWEST_ROWS = 20
"""Fewer rows do not tell an outlier from the rest."""
_RARE = 1e-3
"""Share of rows below which values beyond the clamp count as outliers."""
_SQUEEZED = {"min_max": 0.2, "quantile": 0.2, "mean_std": 1.0}
"""Normalized width below which 99 % of the rows use too little of the model's range, which is 2, or some deviations."""
_COARSE_STEPS = 64
"""Fewest float32 steps in a range that are enough."""
_HARDLY = 1e-3
"""Range below which a state hardly moves, relative to its magnitude and to the widest dimension."""


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """The shortest interval with 99 % of the rows of a dimension, and the rows far outside of it.

    far: positions of the rows that are farther away from the interval than it is wide.
    """

    low: float
    high: float
    far: npt.NDArray[np.intp]


def constant_values(names: Sequence[str], normalizer: Normalizer) -> dict[str, float]:
    """Return the constant of each dimension that is constant, by name. names: those of the D dimensions."""
    return {names[i]: float(normalizer.constants[i]) for i in _positions(normalizer.constant)}


def unscaled_names(names: Sequence[str], normalizer: Normalizer) -> list[str]:
    """Return the names of the dimensions that an older rule shifts without scaling."""
    return [names[i] for i in _positions(normalizer.unscaled)]


def inherited_faults(field: FieldName, names: Sequence[str], normalizer: Normalizer) -> list[str]:
    """Name the dimensions that the rule of older policies and published checkpoints treats badly; one line each kind.

    That is an action whose error is not scaled, and a state that jumps to the clamp when it moves at all.
    """
    if normalizer.rule != "absolute":
        return []
    if field == "action" and normalizer.unscaled.any():
        found = ", ".join(
            f"{names[i]!r} ({_range(normalizer.stats.min[i], normalizer.stats.max[i])})"
            for i in _positions(normalizer.unscaled)
        )
        return [
            f"action {found}: the range is below 1e-4, which this policy's normalization does not scale, so the "
            "model's error reaches the robot as it is; policies trained now return a constant exactly"
        ]
    if field == "state" and normalizer.mode == "mean_std":
        still = _positions(np.array(normalizer.stats.std) < 1e-6)
        if len(still):
            found = ", ".join(f"{names[i]!r} ({normalizer.stats.mean[i]:g})" for i in still)
            return [
                f"state {found}: it never moved in training, so any other value is at the clamp of {CLAMP:g} for this "
                "policy; policies trained now ignore such a state"
            ]
    return []


def training_notes(
    field: FieldName,
    names: Sequence[str],
    normalizer: Normalizer,
    values: FloatArray,
    place: Callable[[int], str],
) -> list[str]:
    """Say what the normalizer does to dimensions of the training rows that a user should know of; one line each.

    values: (N, D) in robot units, those that the statistics are of. place: position of a row -> where it is recorded.
    """
    lines = list(_constant_notes(field, names, normalizer))
    for i in _positions(~normalizer.constant & ~normalizer.unscaled):
        column = np.asarray(values[:, i], dtype=np.float64)
        note = (
            _precision_note(normalizer, i)
            or (_stillness_note(normalizer, i) if field == "state" else None)
            or _range_note(field, normalizer, i, column, place)
        )
        if note is not None:
            lines.append(f"{field} {names[i]!r}: {note}")
    return lines


def bulk_of(column: Float64Array) -> Bulk | None:
    """Return where 99 % of the values (N,) are; None if there are too few of them to tell."""
    count = len(column)
    if count < _FEWEST_ROWS:
        return None
    beyond = max(1, count // 100)
    parted = np.partition(column, (beyond, count - 1 - beyond))
    lows, highs = np.sort(parted[: beyond + 1]), np.sort(parted[count - 1 - beyond :])
    # Without the j lowest and the beyond - j highest values, the rest is in [lows[j], highs[j]].
    best = int(np.argmin(highs - lows))
    low, high = float(lows[best]), float(highs[best])
    far = (column < low - (high - low)) | (column > high + (high - low))
    return Bulk(low=low, high=high, far=np.flatnonzero(far))


def _constant_notes(field: FieldName, names: Sequence[str], normalizer: Normalizer) -> Iterator[str]:
    constants = constant_values(names, normalizer)
    if constants:
        listed = ", ".join(f"{name!r} = {_exact(value)}" for name, value in constants.items())
        does = "the policy always returns this value" if field == "action" else "the policy ignores it"
        yield f"{field} {listed}: constant in the training rows; {does}"
    if normalizer.mode == "identity" and field == "action":
        as_scaled = Normalizer(mode="min_max", stats=normalizer.stats)
        constants = constant_values(names, as_scaled)
        if constants:
            listed = ", ".join(f"{name!r} = {_exact(value)}" for name, value in constants.items())
            yield (
                f"action {listed}: constant in the training rows, but without normalization the model's error is "
                "added to it; normalize_action=min_max returns it exactly"
            )


def _precision_note(normalizer: Normalizer, i: int) -> str | None:
    """Say that float32 was too coarse for what a dimension does."""
    low, high = np.array(normalizer.stats.min[i]), np.array(normalizer.stats.max[i])
    step = float(np.spacing(np.float32(max(abs(low), abs(high)))))
    if not (is_float32(low) and is_float32(high)) or high - low >= _COARSE_STEPS * step:
        return None
    return (
        f"it is recorded in steps of {step:.2g}, which is what float32 resolves near {high:g}, but its range is only "
        f"{high - low:.2g}; record it as float64 or from a nearer origin"
    )


def _stillness_note(normalizer: Normalizer, i: int) -> str | None:
    """Say that a state moves so little that a small difference when acting is beyond everything in training."""
    low, high = np.array(normalizer.stats.min), np.array(normalizer.stats.max)
    spread, size = high - low, np.maximum(np.abs(low), np.abs(high))
    widest = max(1.0, float(spread.max()))
    if spread[i] > _HARDLY * min(size[i], widest) or normalizer.mode == "identity":
        return None
    reach = (CLAMP - normalizer.offset[i]) / normalizer.scale[i] - high[i]
    return (
        f"it hardly moves, {_range(low[i], high[i])} in the training rows; when acting, a difference of {reach:.2g} is "
        "already at the clamp. If that range is noise, choose other features with --state-key"
    )


def _range_note(
    field: FieldName, normalizer: Normalizer, i: int, column: Float64Array, place: Callable[[int], str]
) -> str | None:
    """Say that the clamp, or a few rows, decide what the model sees of a dimension."""
    if normalizer.mode == "identity":
        return None
    mode, key, bulk = normalizer.mode, f"normalize_{field}", bulk_of(column)
    scale, offset = normalizer.scale[i], normalizer.offset[i]
    normalized = column * scale + offset
    if normalizer.widened[i]:
        usual = normalizer.stats.q01[i]
        other = np.flatnonzero(np.abs(column - usual) > 1e-3 * (column.max() - column.min()))
        return (
            f"99 % of the rows are {usual:g}, so its quantiles have no range; {_share(other, column, place)} differ "
            f"({_range(column.min(), column.max())}). Its minimum and maximum are used "
            f"instead; {key}=min_max does so for every dimension{_mistakes(other, column)}"
        )
    clamped = np.flatnonzero(np.abs(normalized) > CLAMP)
    if len(clamped) > max(1, _RARE * len(column)):
        above = normalized[clamped] > 0
        side = 1.0 if above.sum() * 2 >= len(clamped) else -1.0
        limit, extreme = (side * CLAMP - offset) / scale, column.max() if side > 0 else column.min()
        effect = "so the policy does not learn to give more" if field == "action" else "so the policy sees no more"
        return (
            f"{_share(clamped, column, place)} are beyond the clamp of {mode} and count as {limit:.4g}, {effect}, but "
            f"{extreme:g} was recorded; {key}=min_max keeps them"
        )
    if bulk is None or len(bulk.far) == 0 or (bulk.high - bulk.low) * scale >= _SQUEEZED[mode]:
        return None
    if bulk.high == bulk.low and mode != "mean_std" and not _mistakes(bulk.far, column):
        return None  # one usual value and rare others, as of a gripper, are what these modes map well
    used = (bulk.high - bulk.low) / (column.max() - column.min())
    change = ""
    if bulk.high > bulk.low and mode != "quantile":
        change = f"; {key}=quantile gives the other rows more of it and clamps these"
    elif mode == "mean_std":
        change = f"; {key}=min_max maps them to -1 and 1"
    return (
        f"its range {_range(column.min(), column.max())} is that of {_share(bulk.far, column, place)}, while the "
        f"others are {_range(bulk.low, bulk.high)}, {_percent(used)} of it"
        f"{change}{_mistakes(bulk.far, column)}"
    )


def _mistakes(rows: npt.NDArray[np.intp], column: Float64Array) -> str:
    """Say what to do about rows that are so few that they may be mistakes; nothing if they are not."""
    few = len(rows) <= max(1, _RARE * len(column))
    return ". If they are mistakes, cache the dataset with --exclude-episodes" if few else ""


def _share(rows: npt.NDArray[np.intp], column: Float64Array, place: Callable[[int], str]) -> str:
    share = _percent(len(rows) / len(column))
    return f"{len(rows)} of {len(column)} rows ({share}, first: {place(int(rows[0]))})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _exact(value: float) -> str:
    """Write a number with the fewest digits that tell it from its neighbors, in float32 if that holds it."""
    return str(np.float32(value)) if is_float32(np.array(value)) else repr(value)


def _range(low: float, high: float) -> str:
    return f"{low:.7g}" if low == high else f"{low:.7g} to {high:.7g}"


def _positions(mask: BoolArray) -> list[int]:
    found: list[int] = np.flatnonzero(mask).tolist()
    return found

"""Open-loop error: what a policy plans at recorded frames, against what the demonstrator did from there.

No robot and no simulator is needed, and success is not measured: a plan may differ from the recording and be as good.
The number to look at is the ratio to the best constant chunk, which knows the recordings but never looks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.chunks import action_chunk
from imagewam_cli.data.types import ActionChunk, Dataset, Float32Array, Observation, Row
from imagewam_cli.errors import DatasetError, RunError, UsageError
from imagewam_cli.policy.acting import ChunkPolicy

Float64Array = npt.NDArray[np.float64]

_LEAST_ERROR = 1e-12
"""Stands for the constant chunk's error where the recorded actions never change, so that ratios stay finite."""


@dataclass(frozen=True, kw_only=True)
class ChunkErrors:
    """Mean errors of one predictor. `absolute` and `squared`: T x A, in robot units and their squares.

    mean_absolute, mean_squared: over all steps and dimensions; each recorded number counts once.
    """

    absolute: tuple[tuple[float, ...], ...]
    squared: tuple[tuple[float, ...], ...]
    mean_absolute: float
    mean_squared: float


@dataclass(frozen=True, kw_only=True)
class ActionError:
    """Mean absolute errors of one action dimension over all steps, in its robot unit, and the ratio of mean squares."""

    name: str
    policy: float
    constant: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class EpisodeError:
    """Mean errors of the policy's plans in one episode, over all steps and dimensions."""

    episode: int
    rows: int
    mean_absolute: float
    mean_squared: float


@dataclass(frozen=True, kw_only=True)
class OpenLoopResult:
    """Errors of the policy and of the best constant chunk over the same rows and steps.

    horizon: T, steps compared. rows: frames at which a chunk was planned. ratio_to_constant: the policy's mean squared
    error over the constant chunk's; below 1 beats not looking. Where dimensions have different units or ranges, look at
    `per_action` instead: the widest one decides the sum.
    `config.to_dict` makes plain JSON-able values of it, `config.from_dict` reads them back.
    """

    action_names: tuple[str, ...]
    horizon: int
    stride: int
    episodes: int
    rows: int
    policy: ChunkErrors
    constant: ChunkErrors
    ratio_to_constant: float
    per_action: tuple[ActionError, ...]
    per_episode: tuple[EpisodeError, ...]

    @property
    def mean_squared_error(self) -> float:
        """Of the policy, over all steps and dimensions."""
        return self.policy.mean_squared


def open_loop(
    policy: ChunkPolicy,
    dataset: Dataset,
    *,
    horizon: int,
    episodes: Sequence[int] | None = None,
    stride: int = 8,
    batch: int = 16,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> OpenLoopResult:
    """Plan at every `stride`-th frame of each episode and compare with the recorded actions.

    Steps beyond an episode's end are left out. The constant chunk is the mean of the recorded actions per step and
    dimension over exactly the compared numbers, so no other constant has a smaller squared error.
    Memory: one episode's actions and one batch of pictures.

    Args:
        horizon: T, steps of each plan to compare; no more than the policy plans. Steps that even the longest episode
            does not have are left out.
        episodes: indices; None: all.
        batch: frames planned in one call of the policy.
        on_rows: called with the number of rows of each finished batch.

    Raises:
        UsageError: horizon, stride or batch below 1, no episode, or the policy plans fewer than T steps.
        DatasetError: the dataset is damaged, or the policy's actions have other dimensions than the dataset's.
        RunError: the policy planned something that is not a finite number.
    """
    for name, value in (("horizon", horizon), ("stride", stride), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name} is {value}", f"pass at least 1 as {name}")
    lengths = {e.index: e.length for e in dataset.episodes()}
    chosen = sorted(lengths if episodes is None else set(episodes))
    for index in chosen:
        if index not in lengths:
            raise DatasetError(f"{dataset.info.root} has no episode {index}", f"it has {len(lengths)} episodes")
    if not chosen:
        raise UsageError("no episode to compare with", "name at least one episode")
    horizon = min(horizon, max(lengths[index] for index in chosen))
    constant = _constant_chunk(policy, dataset, chosen, stride, horizon)

    shape = (horizon, dataset.info.action_dim)
    planned_sums, constant_sums = _ErrorSums(*shape), _ErrorSums(*shape)
    per_episode = {index: _EpisodeSums() for index in chosen}
    frames = _frames(policy, dataset, chosen, stride, horizon)
    while members := list(itertools.islice(frames, batch)):
        plans = _plan(policy, dataset, [row for row, _ in members], horizon)
        for (row, chunk), plan in zip(members, plans, strict=True):
            difference = _difference(plan, chunk)
            planned_sums.add(difference)
            per_episode[row.episode].add(difference)
            constant_sums.add(_difference(constant, chunk))
        on_rows(len(members))

    planned_errors, constant_errors = planned_sums.errors(), constant_sums.errors()
    return OpenLoopResult(
        action_names=dataset.info.action_names,
        horizon=horizon,
        stride=stride,
        episodes=len(chosen),
        rows=sum(sums.rows for sums in per_episode.values()),
        policy=planned_errors,
        constant=constant_errors,
        ratio_to_constant=_ratio(planned_errors.mean_squared, constant_errors.mean_squared),
        per_action=_per_action(dataset.info.action_names, planned_sums, constant_sums),
        per_episode=tuple(sums.error(index) for index, sums in per_episode.items()),
    )


def _episodes(policy: ChunkPolicy, dataset: Dataset, chosen: Sequence[int]) -> Iterator[tuple[int, Float32Array]]:
    """(episode, all its actions (L, A) as the policy would send them), without decoding a picture."""
    for index, rows in itertools.groupby(dataset.rows(episodes=chosen, images=False), key=lambda row: row.episode):
        yield index, policy.command(np.stack([row.action for row in rows]))


def _constant_chunk(
    policy: ChunkPolicy, dataset: Dataset, chosen: Sequence[int], stride: int, horizon: int
) -> Float64Array:
    """Mean recorded chunk (T, A) over the frames that will be compared."""
    total, count = np.zeros((horizon, dataset.info.action_dim)), np.zeros((horizon, 1))
    for _, actions in _episodes(policy, dataset, chosen):
        for frame in range(0, len(actions), stride):
            chunk = action_chunk(actions, frame, horizon)
            real = ~chunk.is_pad[:, None]
            total += np.where(real, chunk.actions, 0.0)
            count += real
    return total / count


def _frames(
    policy: ChunkPolicy, dataset: Dataset, chosen: Sequence[int], stride: int, horizon: int
) -> Iterator[tuple[Row, ActionChunk]]:
    """Every `stride`-th frame with its pictures, and the recorded chunk that starts there.

    Two streams side by side: one decodes the pictures of the frames that are planned at, one has all actions.
    """
    episodes = _episodes(policy, dataset, chosen)
    index, actions = next(episodes)
    for row in dataset.rows(episodes=chosen, stride=stride):
        while row.episode != index:
            index, actions = next(episodes)
        yield row, action_chunk(actions, row.frame, horizon)


def _plan(policy: ChunkPolicy, dataset: Dataset, rows: Sequence[Row], horizon: int) -> Float64Array:
    """The first T steps of the plans, (B, T, A)."""
    observations: list[Observation] = [row.observation() for row in rows]
    plans = np.asarray(policy.chunks(observations), dtype=np.float64)
    actions = dataset.info.action_dim
    if plans.ndim != 3 or plans.shape[0] != len(rows) or plans.shape[2] != actions:
        raise DatasetError(
            f"the policy planned an array of shape {plans.shape} for {len(rows)} frames of {dataset.info.root}, "
            f"which has {actions} action dimensions: {', '.join(dataset.info.action_names)}",
            "use the kind of dataset that the policy was trained on",
        )
    if plans.shape[1] < horizon:
        raise UsageError(
            f"the policy plans {plans.shape[1]} steps, fewer than the horizon {horizon}",
            f"compare {plans.shape[1]} steps or fewer",
        )
    for row, plan in zip(rows, plans, strict=True):
        if not np.isfinite(plan).all():
            raise RunError(
                f"the policy planned numbers that are not finite at episode {row.episode}, frame {row.frame}",
                "look at that frame, and at the policy's statistics and weights",
            )
    return plans[:, :horizon]


def _difference(plan: Float64Array, chunk: ActionChunk) -> Float64Array:
    """plan - recorded, (steps, A), without the padding, which stands at the end."""
    steps = int((~chunk.is_pad).sum())
    return plan[:steps] - chunk.actions[:steps]


class _ErrorSums:
    """Sums over rows of absolute and squared errors, (T, A), and of the rows that have each step, (T, 1)."""

    def __init__(self, horizon: int, actions: int) -> None:
        self.absolute = np.zeros((horizon, actions))
        self.squared = np.zeros((horizon, actions))
        self.count = np.zeros((horizon, 1))

    def add(self, difference: Float64Array) -> None:
        steps = len(difference)
        self.absolute[:steps] += np.abs(difference)
        self.squared[:steps] += difference**2
        self.count[:steps] += 1

    def errors(self) -> ChunkErrors:
        numbers = self.count.sum() * self.absolute.shape[1]
        return ChunkErrors(
            absolute=_as_tuples(self.absolute / self.count),
            squared=_as_tuples(self.squared / self.count),
            mean_absolute=float(self.absolute.sum() / numbers),
            mean_squared=float(self.squared.sum() / numbers),
        )


@dataclass(kw_only=True)
class _EpisodeSums:
    """Sums over all steps and dimensions of one episode."""

    rows: int = 0
    numbers: int = 0
    absolute: float = 0.0
    squared: float = 0.0

    def add(self, difference: Float64Array) -> None:
        self.rows += 1
        self.numbers += difference.size
        self.absolute += float(np.abs(difference).sum())
        self.squared += float((difference**2).sum())

    def error(self, episode: int) -> EpisodeError:
        return EpisodeError(
            episode=episode,
            rows=self.rows,
            mean_absolute=self.absolute / self.numbers,
            mean_squared=self.squared / self.numbers,
        )


def _per_action(names: Sequence[str], planned: _ErrorSums, constant: _ErrorSums) -> tuple[ActionError, ...]:
    count = float(planned.count.sum())
    return tuple(
        ActionError(
            name=name,
            policy=float(planned.absolute[:, i].sum()) / count,
            constant=float(constant.absolute[:, i].sum()) / count,
            ratio=_ratio(float(planned.squared[:, i].sum()) / count, float(constant.squared[:, i].sum()) / count),
        )
        for i, name in enumerate(names)
    )


def _ratio(planned: float, constant: float) -> float:
    return planned / max(constant, _LEAST_ERROR)


def _as_tuples(values: Float64Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)

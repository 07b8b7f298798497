"""Open-loop error: compare the actions that a policy plans at recorded frames with the recorded ones.

This needs neither robot nor simulator, but does not measure success: a plan may differ from the recording and be just
as good. Compare the error with that of the best constant chunk, which is fitted to the recordings but ignores
observations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.chunks import action_chunk
from imagewam_cli.data.types import ActionChunk, Dataset, FloatArray, Observation, Row
from imagewam_cli.errors import DatasetError, RunError, UsageError
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.matching import matched_dataset
from imagewam_cli.training.held_out import Use, exposure

Float64Array = npt.NDArray[np.float64]

_MIN_ERROR = 1e-12
"""Minimum error of the constant chunk in ratios: keeps them finite if the recorded actions never change."""


@dataclass(frozen=True, kw_only=True)
class ChunkErrors:
    """Mean errors of one predictor.

    absolute, squared: T x A, in robot units and their squares; mean_absolute, mean_squared: means over all recorded
    numbers, each counted once.
    """

    absolute: tuple[tuple[float, ...], ...]
    squared: tuple[tuple[float, ...], ...]
    mean_absolute: float
    mean_squared: float


@dataclass(frozen=True, kw_only=True)
class ActionError:
    """Mean absolute errors of one action dimension, in its robot unit.

    policy, constant: errors of the policy and of the constant chunk; ratio: ratio of their mean squared errors.
    """

    name: str
    policy: float
    constant: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class EpisodeError:
    """Mean errors of the policy in one episode, over all steps and dimensions."""

    episode: int
    rows: int
    mean_absolute: float
    mean_squared: float
    training: Use = "unknown"
    """What the policy's training did with this episode."""


@dataclass(frozen=True, kw_only=True)
class OpenLoopResult:
    """Errors of the policy and of the best constant chunk over the same rows and steps.

    horizon: number of compared steps T; rows: number of frames at which a chunk was planned.
    ratio_to_constant: the policy's mean squared error divided by the constant chunk's; below 1, the policy uses
    its observations. If dimensions have different units or ranges, read `per_action` instead: the dimension with the
    widest range dominates the sum.

    `config.to_dict` converts the result to JSON-ready values, and `config.from_dict` reads them back.
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

    def count(self, use: Use) -> int:
        """Return how many of the episodes the policy was trained on, were held out, or are unknown."""
        return sum(error.training == use for error in self.per_episode)

    @property
    def mean_squared_error(self) -> float:
        """Mean squared error of the policy, over all steps and dimensions."""
        return self.policy.mean_squared


def open_loop(
    policy: ChunkPolicy,
    dataset: Dataset,
    *,
    horizon: int,
    episodes: Sequence[int] | None = None,
    held_out: bool = False,
    cameras: Mapping[str, str] | None = None,
    stride: int = 8,
    batch: int = 16,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> OpenLoopResult:
    """Plan at every `stride`-th frame of each episode and compare with the recorded actions.

    Steps beyond an episode's end are skipped. The constant chunk is the mean of the compared actions per step and
    dimension, so it minimizes the squared error among constants. Holds one episode's actions and one batch of pictures
    in memory.

    Args:
        horizon: number of steps T to compare, at most the policy's horizon; limited to the length of the longest
            episode.
        episodes: indices of the episodes; None: all.
        held_out: leave out the episodes that the policy was trained on.
        cameras: camera of the dataset -> camera of the policy, where their names differ.
        batch: number of frames per call of the policy.
        on_rows: called with the number of rows of each finished batch.

    Raises:
        UsageError: `horizon`, `stride` or `batch` is below 1, `episodes` is empty, or the policy plans fewer than T
            steps.
        DatasetError: the dataset is damaged, or its action dimensions are not the policy's; or `held_out` is set, and
            no such episode is known.
        RunError: the policy planned a number that is not finite, or differs from the dataset in cameras, names or rate
            (`policy.matching`).
    """
    for name, value in (("horizon", horizon), ("stride", stride), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    dataset = matched_dataset(policy.interface, dataset, cameras)
    seen = exposure(policy, dataset)
    lengths = {e.index: e.length for e in dataset.episodes()}
    chosen = sorted(lengths if episodes is None else set(episodes))
    if held_out:
        kept = set(seen.held_out(dataset))
        chosen = [index for index in chosen if index in kept]
    for index in chosen:
        if index not in lengths:
            raise DatasetError(f"{dataset.info.root} has no episode {index}", f"it has {len(lengths)} episodes")
    if not chosen:
        raise UsageError("no episode to compare with", "choose at least one episode")
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
        per_episode=tuple(sums.error(index, seen.use(index)) for index, sums in per_episode.items()),
    )


def _episodes(policy: ChunkPolicy, dataset: Dataset, chosen: Sequence[int]) -> Iterator[tuple[int, FloatArray]]:
    """Yield each episode's index and its actions (L, A), converted to commands, without decoding pictures."""
    for index, rows in itertools.groupby(dataset.rows(episodes=chosen, images=False), key=lambda row: row.episode):
        yield index, policy.command(np.stack([row.action for row in rows]))


def _constant_chunk(
    policy: ChunkPolicy, dataset: Dataset, chosen: Sequence[int], stride: int, horizon: int
) -> Float64Array:
    """Return the mean recorded chunk (T, A) over the compared frames."""
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
    """Yield every `stride`-th frame with its pictures, and the recorded chunk that starts there.

    Reads two streams: one decodes pictures of these frames only, the other reads the actions of all frames.
    """
    episodes = _episodes(policy, dataset, chosen)
    index, actions = next(episodes)
    for row in dataset.rows(episodes=chosen, stride=stride):
        while row.episode != index:
            index, actions = next(episodes)
        yield row, action_chunk(actions, row.frame, horizon)


def _plan(policy: ChunkPolicy, dataset: Dataset, rows: Sequence[Row], horizon: int) -> Float64Array:
    """Plan at the rows and return the first T steps, (B, T, A)."""
    observations: list[Observation] = [row.observation() for row in rows]
    plans = np.asarray(policy.chunks(observations), dtype=np.float64)
    actions = dataset.info.action_dim
    if plans.ndim != 3 or plans.shape[0] != len(rows) or plans.shape[2] != actions:
        raise DatasetError(
            f"the policy planned an array of shape {plans.shape} for {len(rows)} frames of {dataset.info.root}, "
            f"which has {actions} action dimensions: {', '.join(dataset.info.action_names)}",
            "use a dataset of the robot that the policy was trained for",
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
                "check that frame, and the policy's statistics and weights",
            )
    return plans[:, :horizon]


def _difference(plan: Float64Array, chunk: ActionChunk) -> Float64Array:
    """Return plan - recorded, (steps, A), without the padding at the end."""
    steps = int((~chunk.is_pad).sum())
    return plan[:steps] - chunk.actions[:steps]


class _ErrorSums:
    """Sums of absolute and squared errors over rows, (T, A), and the number of rows that have each step, (T, 1)."""

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
    """Sums of errors over all steps and dimensions of one episode."""

    rows: int = 0
    numbers: int = 0
    absolute: float = 0.0
    squared: float = 0.0

    def add(self, difference: Float64Array) -> None:
        self.rows += 1
        self.numbers += difference.size
        self.absolute += float(np.abs(difference).sum())
        self.squared += float((difference**2).sum())

    def error(self, episode: int, training: Use) -> EpisodeError:
        return EpisodeError(
            episode=episode,
            rows=self.rows,
            mean_absolute=self.absolute / self.numbers,
            mean_squared=self.squared / self.numbers,
            training=training,
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
    return planned / max(constant, _MIN_ERROR)


def _as_tuples(values: Float64Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)

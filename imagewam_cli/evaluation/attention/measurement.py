"""Measure where a policy's action tokens attend, and how much attention falls on the regions that will change.

The policy plans at recorded frames. The attention of its action tokens on picture tokens (mean over heads, action
tokens and Euler steps, renormalized over the pictures) is compared with the tokens that change between the frame and a
later one. The `lift` is the attention on these tokens divided by their share of the area; uniform attention has lift 1.

A lift above 1 can also come from attending to the center of the picture or to salient objects. Two controls are
therefore reported: the same maps on the changes of other episodes, and the maps of an untrained expert.

Source: the attention analysis of arXiv 2606.19531; the definitions of the numbers are this module's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from imagewam_cli.data.camera_layout import recorded_layout
from imagewam_cli.data.types import Dataset, Row, UInt8Image
from imagewam_cli.errors import DatasetError, UsageError
from imagewam_cli.evaluation.attention.frame_pairs import FramePair, read_frame_pairs, spread_frame_pairs
from imagewam_cli.evaluation.attention.maps import (
    STILL,
    BoolArray,
    Float64Array,
    changed,
    combined,
    differences,
    grid_of,
    lift,
    lifts,
    picture_map,
    shares,
)
from imagewam_cli.evaluation.statistics import Mean
from imagewam_cli.expert.attention_probe import action_attention, untrained_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.policy.matching import matched_dataset
from imagewam_cli.policy.policy import Policy

Target = Literal["horizon", "end"]
AVERAGE = "average"
"""Name of the mean over layers in results."""


@dataclass(frozen=True, kw_only=True)
class LiftStatistics:
    """Mean lifts of one expert's maps.

    own: lift on the changes of the same row; others: lift on the changes of rows of other episodes; above: own minus
    others, per row.
    """

    own: Mean
    others: Mean
    above: Mean


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Results of one layer, or of the mean over layers; each is averaged over rows.

    shares: kind of segment (`own` for the chunk's tokens) -> share of the trained expert's attention.
    mass: share of its attention on pictures that is on changing tokens; area: share of the picture that changes.
    """

    layer: str
    grid: tuple[int, int]
    shares: Mapping[str, float]
    mass: float
    area: float
    trained: LiftStatistics
    untrained: LiftStatistics


@dataclass(frozen=True, kw_only=True)
class RowAttention:
    """Results of one row.

    area: share of the picture that changes; lift: lift of the mean map over layers.
    """

    episode: int
    frame: int
    target: int
    instruction: str
    area: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class AttentionResult:
    """Results of `evaluate_attention`. Intervals are 95 %, over episodes.

    held_out: whether all episodes were held out from training; rows: number of measured rows; still: number of rows
    skipped because nothing changes in them.

    `config.to_dict` converts the result to JSON-ready values, and `config.from_dict` reads them back.
    """

    target: Target
    horizon: int
    held_out: bool
    rows: int
    still: int
    episodes: int
    average: LayerAttention
    layers: tuple[LayerAttention, ...]
    """Layers that hold picture tokens."""
    per_row: tuple[RowAttention, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionSample:
    """The attention measured at one row.

    now, target: the editor's input at the row and at the later frame, uint8 (H, W, 3).
    maps, shares: results of the trained expert, one per layer that holds pictures.
    untrained: maps of the untrained expert.
    """

    row: Row
    target_frame: int
    now: UInt8Image
    target: UInt8Image
    maps: tuple[Float64Array, ...]
    untrained: tuple[Float64Array, ...]
    shares: tuple[Mapping[str, float], ...]

    @property
    def average(self) -> Float64Array:
        """Mean map over layers, on the finest of their grids."""
        return average(self.maps)

    @property
    def still(self) -> bool:
        """Whether the picture changes too little to measure attention on the change."""
        return float(differences(self.now, self.target, grid_of(self.average)).max()) < STILL

    def region(self, like: Float64Array) -> BoolArray:
        """Return the changing tokens as a mask on the grid of the map `like`."""
        return changed(self.now, self.target, grid_of(like))

    def lift(self, values: Float64Array) -> float:
        """Return the lift of a map on the changing tokens."""
        return lift(values, self.region(values))


def evaluate_attention(
    policy: Policy,
    dataset: Dataset,
    *,
    rows: int,
    target: Target = "horizon",
    held_out: Sequence[int] = (),
    cameras: Mapping[str, str] | None = None,
    batch: int = 8,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[AttentionResult, tuple[AttentionSample, ...]]:
    """Measure attention at `rows` frames of the episodes `held_out`, or of all episodes if that is empty.

    target: the later frame. `horizon`: the frame after the chunk, or the episode's last one; `end`: the last frame.
    cameras: camera of the dataset -> camera of the policy, where their names differ.
    on_rows: called with the number of rows of each finished batch.

    Returns the results and the measured samples, sorted by episode and frame.

    Raises:
        UsageError: no layer of the prefix holds pictures, the expert does not use the prefix, or `rows` is below 2.
        DatasetError: the dataset is damaged, or fewer than two episodes show a change.
        RunError: the policy and the dataset differ in cameras, names or rate (`policy.matching`).
    """
    _require_pictures(policy)
    dataset = matched_dataset(policy.interface, dataset, cameras)
    known = set(held_out)
    episodes = [e for e in dataset.episodes() if not known or e.index in known]
    pairs = spread_frame_pairs(episodes, rows, policy.horizon if target == "horizon" else None)
    measured = list(_samples(policy, dataset, pairs, batch, on_rows))
    moving = tuple(sample for sample in measured if not sample.still)
    if len({s.row.episode for s in moving}) < 2:
        count = len({s.row.episode for s in measured})
        raise DatasetError(
            f"fewer than two of {count} episodes show a change between frame and target",
            "measure more rows with --rows, or use --target end",
        )
    return _result(policy, moving, target, bool(known), len(measured) - len(moving)), moving


def average(maps: Sequence[Float64Array]) -> Float64Array:
    """Return the mean of maps of the same picture, on the finest of their grids."""
    return combined(maps) / len(maps)


def _require_pictures(policy: Policy) -> None:
    if not any(layer.holds_pictures for layer in policy.expert.config.layers):
        raise UsageError(
            "no layer of this policy's prefix holds picture tokens, so there is nothing to measure",
            "build the cache with a picture segment, such as --segments text,reference, and train again",
        )
    if not policy.expert.config.use_prefix:
        raise UsageError("this policy's expert does not use the prefix", "train a policy with expert.use_prefix=true")


def _samples(
    policy: Policy, dataset: Dataset, pairs: Sequence[FramePair], batch: int, on_rows: Callable[[int], None]
) -> Iterator[AttentionSample]:
    """Yield the samples of the frame pairs. The trained and the untrained expert attend to the same prefix."""
    untrained = untrained_expert(policy.expert.config).to(policy.device)
    spec, own = policy.parts.editor.spec, policy.expert.config.horizon + (policy.expert.config.state_dim > 0)
    layers = [n for n, layer in enumerate(spec.layers) if layer.holds_pictures]
    layout = recorded_layout(policy.parts.editor.settings.camera_layout)
    pictures = len(layout.reference_sizes(spec.image_size, len(spec.cameras)))
    rows = read_frame_pairs(dataset, pairs)
    while members := list(itertools.islice(rows, batch)):
        weights, random = _attention(policy, [now for now, _ in members], (policy.expert, untrained))
        for i, (now, later) in enumerate(members):
            yield AttentionSample(
                row=now,
                target_frame=later.frame,
                now=_canvas(now, policy),
                target=_canvas(later, policy),
                maps=tuple(picture_map(weights[n][i], spec.layers[n], own, pictures) for n in layers),
                untrained=tuple(picture_map(random[n][i], spec.layers[n], own, pictures) for n in layers),
                shares=tuple(shares(weights[n][i], spec.layers[n], own) for n in layers),
            )
        on_rows(len(members))


def _attention(
    policy: Policy, rows: Sequence[Row], experts: Sequence[ActionExpert]
) -> tuple[tuple[Float64Array, ...], ...]:
    """Return the attention of the action tokens, (B, K), per expert and layer."""
    observations = [row.observation() for row in rows]
    config = policy.parts.config
    with torch.no_grad():
        prefix, state = policy.prefix(observations), policy.normalized_state(observations)
        noise, schedule = policy.initial_noise(len(rows)), FlowSchedule(shift=config.shift)
        found = [action_attention(e, noise, state, prefix, schedule, config.inference_steps) for e in experts]
    return tuple(tuple(weights.numpy() for weights in layers) for layers in found)


def _canvas(row: Row, policy: Policy) -> UInt8Image:
    reference = policy.parts.editor
    spec, layout = reference.spec, recorded_layout(reference.settings.camera_layout)
    return layout.compose(row.images, spec.cameras, spec.image_size)


def _result(
    policy: Policy, samples: Sequence[AttentionSample], target: Target, held_out: bool, still: int
) -> AttentionResult:
    names = [layer.name for layer in policy.parts.editor.spec.layers if layer.holds_pictures]
    layers = tuple(
        _layer(name, samples, [s.maps[i] for s in samples], [s.untrained[i] for s in samples], [i])
        for i, name in enumerate(names)
    )
    trained, untrained = [s.average for s in samples], [average(s.untrained) for s in samples]
    everything = _layer(AVERAGE, samples, trained, untrained, range(len(names)))
    return AttentionResult(
        target=target,
        horizon=policy.horizon,
        held_out=held_out,
        rows=len(samples),
        still=still,
        episodes=len({s.row.episode for s in samples}),
        average=everything,
        layers=layers,
        per_row=tuple(_row(sample) for sample in samples),
    )


def _layer(
    name: str,
    samples: Sequence[AttentionSample],
    trained: Sequence[Float64Array],
    untrained: Sequence[Float64Array],
    of: Sequence[int],
) -> LayerAttention:
    """Summarize one layer. trained, untrained: one map per row; of: indices of the layers whose shares are averaged."""
    regions = np.stack([s.region(m) for s, m in zip(samples, trained, strict=True)])
    episodes = [s.row.episode for s in samples]
    counted = [s.shares[i] for s in samples for i in of]
    kinds = dict.fromkeys(kind for one in counted for kind in one)
    return LayerAttention(
        layer=name,
        grid=grid_of(trained[0]),
        shares={kind: float(np.mean([one.get(kind, 0.0) for one in counted])) for kind in kinds},
        mass=float(np.mean([m[region].sum() for m, region in zip(trained, regions, strict=True)])),
        area=float(regions.mean()),
        trained=lift_statistics(np.stack(trained), regions, episodes),
        untrained=lift_statistics(np.stack(untrained), regions, episodes),
    )


def lift_statistics(maps: Float64Array, regions: BoolArray, episodes: Sequence[int]) -> LiftStatistics:
    """Average the lifts of N maps on the changes of their own rows and of other episodes' rows.

    maps, regions: (N, R, C); episodes: the episode of each row.
    """
    each = lifts(maps, regions)
    foreign = np.asarray(episodes)[:, None] != np.asarray(episodes)[None, :]
    own, others = np.diagonal(each), (each * foreign).sum(axis=1) / foreign.sum(axis=1)
    return LiftStatistics(
        own=Mean.bootstrap(own.tolist(), episodes),
        others=Mean.bootstrap(others.tolist(), episodes),
        above=Mean.bootstrap((own - others).tolist(), episodes),
    )


def _row(sample: AttentionSample) -> RowAttention:
    return RowAttention(
        episode=sample.row.episode,
        frame=sample.row.frame,
        target=sample.target_frame,
        instruction=sample.row.instruction,
        area=float(sample.region(sample.average).mean()),
        lift=sample.lift(sample.average),
    )

"""Where a policy's action tokens look, and whether they look at what is going to change.

The policy acts on recorded frames: editor, then the expert's Euler steps. The attention of the action tokens on picture
tokens (mean over heads, action tokens and steps, renormalised over the pictures) is compared with the tokens that
change from the frame to a later one. `lift`: attention on them over their share of the area; 1 is what looking
everywhere alike gives. Two things lie beside it, since a lift can come from looking at the middle or from what is
conspicuous: the same maps against the changes of other episodes, and the maps of an expert that has learned nothing.
Source: the attention analysis of arXiv 2606.19531; the numbers are this module's own.
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
from imagewam_cli.evaluation.attention.frame_pairs import Moment, read_moments, spread_moments
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
from imagewam_cli.policy.policy import Policy

Target = Literal["horizon", "end"]
AVERAGE = "average"
"""The name of the mean over layers."""


@dataclass(frozen=True, kw_only=True)
class Gaze:
    """Lifts of one expert's maps. own: on what changes in the same row; others: on what changes in rows of other
    episodes; above: own minus others, row by row."""

    own: Mean
    others: Mean
    above: Mean


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """One layer, or the mean over layers.

    shares: kind of segment, and `own` for the chunk's tokens -> share of the trained expert's attention. mass: its
    attention on what changes, of that on pictures; area: share of the picture that changes; means over rows.
    """

    layer: str
    grid: tuple[int, int]
    shares: Mapping[str, float]
    mass: float
    area: float
    trained: Gaze
    untrained: Gaze


@dataclass(frozen=True, kw_only=True)
class RowAttention:
    """One row that was measured. lift: of the mean over layers; area: share of the picture that changes."""

    episode: int
    frame: int
    target: int
    instruction: str
    area: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class AttentionResult:
    """rows: those that were measured; still: those left out because nothing changes in them. held_out: whether all are
    of episodes that the policy's run kept from training. Intervals are 95 %, over episodes.
    `config.to_dict` makes plain JSON-able values of it, `config.from_dict` reads them back.
    """

    target: Target
    horizon: int
    held_out: bool
    rows: int
    still: int
    episodes: int
    average: LayerAttention
    layers: tuple[LayerAttention, ...]
    """Those that hold picture tokens."""
    per_row: tuple[RowAttention, ...]


@dataclass(frozen=True, kw_only=True)
class Glance:
    """One row as it was looked at. now, target: uint8 (H, W, 3), as the editor is given pictures; maps, shares: of the
    trained expert, one for each layer that holds pictures; untrained: the untrained expert's maps."""

    row: Row
    target_frame: int
    now: UInt8Image
    target: UInt8Image
    maps: tuple[Float64Array, ...]
    untrained: tuple[Float64Array, ...]
    shares: tuple[Mapping[str, float], ...]

    @property
    def average(self) -> Float64Array:
        """The mean map over layers, on the finest of their grids."""
        return average(self.maps)

    @property
    def still(self) -> bool:
        """Whether nothing changes that could be looked at."""
        return float(differences(self.now, self.target, grid_of(self.average)).max()) < STILL

    def region(self, like: Float64Array) -> BoolArray:
        """What changes, on the grid of the map `like`."""
        return changed(self.now, self.target, grid_of(like))

    def lift(self, values: Float64Array) -> float:
        """Of a map on what changes."""
        return lift(values, self.region(values))


def evaluate_attention(
    policy: Policy,
    dataset: Dataset,
    *,
    rows: int,
    target: Target = "horizon",
    held_out: Sequence[int] = (),
    batch: int = 8,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[AttentionResult, tuple[Glance, ...]]:
    """Look at `rows` frames, spread over the held-out episodes, or over all where none are named.

    target: `horizon`: the frame after the chunk, at most the episode's last; `end`: the episode's last frame.
    on_rows: called with the number of rows of each finished batch.

    Returns the numbers and the measured rows' maps, in order of (episode, frame).

    Raises:
        UsageError: no layer of the editor holds pictures, the expert never looks at the prefix, or too few rows.
        DatasetError: a camera or state that the policy needs is missing, or fewer than two episodes show a change.
    """
    _require_pictures(policy)
    known = set(held_out)
    episodes = [e for e in dataset.episodes() if not known or e.index in known]
    moments = spread_moments(episodes, rows, policy.horizon if target == "horizon" else None)
    seen = list(_glances(policy, dataset, moments, batch, on_rows))
    moving = tuple(glance for glance in seen if not glance.still)
    if len({g.row.episode for g in moving}) < 2:
        raise DatasetError(
            f"fewer than two of {len({g.row.episode for g in seen})} episodes show a change between frame and target",
            "compare more rows, or with --target end",
        )
    return _result(policy, moving, target, bool(known), len(seen) - len(moving)), moving


def average(maps: Sequence[Float64Array]) -> Float64Array:
    """The mean of maps over the same picture, on the finest of their grids."""
    return combined(maps) / len(maps)


def _require_pictures(policy: Policy) -> None:
    if not any(layer.holds_pictures for layer in policy.expert.config.layers):
        raise UsageError(
            "no layer of this policy's prefix holds picture tokens: there is no picture to look at",
            "keep a segment of pictures when caching, such as --segments text,reference",
        )
    if not policy.expert.config.use_prefix:
        raise UsageError("this policy's expert never looks at the prefix", "train one with expert.use_prefix=true")


def _glances(
    policy: Policy, dataset: Dataset, moments: Sequence[Moment], batch: int, on_rows: Callable[[int], None]
) -> Iterator[Glance]:
    """Both experts on the editor's one prefix."""
    untrained = untrained_expert(policy.expert.config).to(policy.device)
    spec, own = policy.parts.editor.spec, policy.expert.config.horizon + (policy.expert.config.state_dim > 0)
    layers = [n for n, layer in enumerate(spec.layers) if layer.holds_pictures]
    layout = recorded_layout(policy.parts.editor.settings.camera_layout)
    pictures = len(layout.reference_sizes(spec.image_size, len(spec.cameras)))
    pairs = read_moments(dataset, moments)
    while members := list(itertools.islice(pairs, batch)):
        weights, random = _attention(policy, [now for now, _ in members], (policy.expert, untrained))
        for i, (now, later) in enumerate(members):
            yield Glance(
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
    """Per expert and layer: attention of the action tokens (B, K)."""
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


def _result(policy: Policy, glances: Sequence[Glance], target: Target, held_out: bool, still: int) -> AttentionResult:
    names = [layer.name for layer in policy.parts.editor.spec.layers if layer.holds_pictures]
    layers = tuple(
        _layer(name, glances, [g.maps[i] for g in glances], [g.untrained[i] for g in glances], [i])
        for i, name in enumerate(names)
    )
    trained, untrained = [g.average for g in glances], [average(g.untrained) for g in glances]
    everything = _layer(AVERAGE, glances, trained, untrained, range(len(names)))
    return AttentionResult(
        target=target,
        horizon=policy.horizon,
        held_out=held_out,
        rows=len(glances),
        still=still,
        episodes=len({g.row.episode for g in glances}),
        average=everything,
        layers=layers,
        per_row=tuple(_row(glance) for glance in glances),
    )


def _layer(
    name: str,
    glances: Sequence[Glance],
    trained: Sequence[Float64Array],
    untrained: Sequence[Float64Array],
    of: Sequence[int],
) -> LayerAttention:
    """trained, untrained: a map of each row; of: the layers whose mean shares are told."""
    regions = np.stack([g.region(m) for g, m in zip(glances, trained, strict=True)])
    episodes = [g.row.episode for g in glances]
    counted = [g.shares[i] for g in glances for i in of]
    kinds = dict.fromkeys(kind for one in counted for kind in one)
    return LayerAttention(
        layer=name,
        grid=grid_of(trained[0]),
        shares={kind: float(np.mean([one.get(kind, 0.0) for one in counted])) for kind in kinds},
        mass=float(np.mean([m[region].sum() for m, region in zip(trained, regions, strict=True)])),
        area=float(regions.mean()),
        trained=gaze(np.stack(trained), regions, episodes),
        untrained=gaze(np.stack(untrained), regions, episodes),
    )


def gaze(maps: Float64Array, regions: BoolArray, episodes: Sequence[int]) -> Gaze:
    """Lifts of N maps (N, R, C) on the changing regions (N, R, C) of their own rows and of other episodes' rows."""
    each = lifts(maps, regions)
    foreign = np.asarray(episodes)[:, None] != np.asarray(episodes)[None, :]
    own, others = np.diagonal(each), (each * foreign).sum(axis=1) / foreign.sum(axis=1)
    return Gaze(
        own=Mean.bootstrap(own.tolist(), episodes),
        others=Mean.bootstrap(others.tolist(), episodes),
        above=Mean.bootstrap((own - others).tolist(), episodes),
    )


def _row(glance: Glance) -> RowAttention:
    return RowAttention(
        episode=glance.row.episode,
        frame=glance.row.frame,
        target=glance.target_frame,
        instruction=glance.row.instruction,
        area=float(glance.region(glance.average).mean()),
        lift=glance.lift(glance.average),
    )

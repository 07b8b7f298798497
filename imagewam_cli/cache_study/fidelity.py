"""What a cache's compact numbers cost: errors of keys, of values, and of what attention makes of them.

The reference is the editor's own output for the same rows. Attention is asked with keys of the layer itself, evenly
spaced over its tokens, so that queries are of the size and directions that occur there; its error is relative, by root
mean squares over heads, queries and rows. With a policy: how much its actions and its flow loss change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.augmentation import augmented
from imagewam_cli.data.types import Dataset, Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import UsageError
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.kvcache.building.encoding import batches
from imagewam_cli.kvcache.building.shard_plan import bytes_per_row
from imagewam_cli.kvcache.codecs.contract import Codec, FittedCodec
from imagewam_cli.kvcache.codecs.fitting import fitted_to, sample_prefixes
from imagewam_cli.kvcache.format.frame_table import Indices
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.policy.policy import Policy
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.pooling import pooled_layer, pooled_prefix
from imagewam_cli.prefix.spec import KVSpec, LayerSpec
from imagewam_cli.registry import Registry
from imagewam_cli.training.data import Batch
from imagewam_cli.training.objective import flow_loss

_QUERIES = 32
"""Of each row and layer."""
POOLS = (1, 2)
"""Cells that are tried."""
_BATCH = 8

T = TypeVar("T", "LayerErrors", "SettingErrors", "PolicyChange")


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Relative errors of one layer. k, v: None where tokens were pooled, so that there is nothing to compare with."""

    layer: str
    k: float | None
    v: float | None
    attention: float


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """action: root mean square of the change of normalised actions; losses: flow loss on the same noise."""

    action: float
    exact_loss: float
    stored_loss: float


@dataclass(frozen=True, kw_only=True)
class SettingErrors:
    """One way to store the rows."""

    codec: str
    pool: int
    bytes_per_row: int
    attention: float
    """Mean over layers."""


@dataclass(frozen=True, kw_only=True)
class FidelityResult:
    """layers: of the cache as it is; settings: of other ways to store the same prefixes, smallest first."""

    codec: str
    bytes_per_row: int
    rows: int
    layers: tuple[LayerErrors, ...]
    settings: tuple[SettingErrors, ...]
    policy: PolicyChange | None


def evaluate_fidelity(
    reader: CacheReader,
    dataset: Dataset,
    editor: Editor,
    *,
    rows: int,
    policy: Policy | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> FidelityResult:
    """Look at `rows` rows, spread over the cache; figures are means over batches of a few rows.

    editor: the one that the cache was made with.
    """
    spec, count = reader.manifest.spec, min(rows, len(reader))
    places = np.linspace(0, len(reader) - 1, count).round().astype(np.int64)
    unpooled = reader.manifest.settings.pool == 1
    codecs = [Registry.installed().codecs.load(entry.name) for entry in Registry.installed().codecs]
    samples = sample_prefixes(editor, dataset, reader.manifest.dataset.stride)
    tried = storage_candidates(spec, codecs, samples, pools=POOLS if unpooled else (1,))
    layers, settings, changes = [], [], []
    for numbers, few in _picked(reader, dataset, places):
        stored = reader.read(numbers)
        exact = editor.encode([r.images for r in few], [r.instruction for r in few]).to("cpu", torch.float32)
        layers.append(compare(spec, exact, stored))
        settings.append(compare_candidates(spec, exact, tried))
        if policy is not None:
            changes.append(policy_change(policy, few, exact, stored))
        on_rows(len(few))
    return FidelityResult(
        codec=reader.manifest.codec,
        bytes_per_row=bytes_per_row(spec, reader.codec),
        rows=count,
        layers=tuple(_mean(LayerErrors, same) for same in zip(*layers, strict=True)),
        settings=tuple(
            sorted(
                (_mean(SettingErrors, same) for same in zip(*settings, strict=True)),
                key=lambda s: (s.bytes_per_row, s.attention),
            )
        ),
        policy=_mean(PolicyChange, changes) if changes else None,
    )


def _picked(reader: CacheReader, dataset: Dataset, places: Indices) -> Iterator[tuple[Indices, list[Row]]]:
    """The cache's rows at these places, with their pictures, a few at a time."""
    index, origin = reader.index, reader.manifest.dataset
    wanted = {(int(index.row[place]), int(index.variant[place])): int(place) for place in places}
    shown = {int(row) for row in index.row[places]}
    frames = dataset.rows(episodes=np.unique(index.episode[places]).tolist(), stride=origin.stride)
    views = augmented((r for r in frames if r.row in shown), origin.augmentation)
    for few in batches((r for r in views if (r.row, r.variant) in wanted), _BATCH):
        yield np.array([wanted[r.row, r.variant] for r in few]), few


def _mean(kind: type[T], same: Sequence[T]) -> T:
    """Field by field; names, counts and what is not known stay."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        found = [getattr(x, field.name) for x in same]
        values[field.name] = float(np.mean(found)) if isinstance(found[0], float) else found[0]
    return kind(**values)


def layer_errors(layer: LayerSpec, exact: LayerKV, stored: LayerKV, valid: tuple[Tensor | None, ...]) -> LayerErrors:
    """exact, stored: float32 (B, P, G, D), with tokens of their own; valid: bool (B, P) or None of each."""
    seen = [v if layer.holds_text else None for v in valid]
    same = exact.k.shape == stored.k.shape
    queries = _queries(exact.k, seen[0])
    return LayerErrors(
        layer=layer.name,
        k=_relative(stored.k, exact.k, seen[0]) if same else None,
        v=_relative(stored.v, exact.v, seen[0]) if same else None,
        attention=_relative(_attend(queries, stored, seen[1]), _attend(queries, exact, seen[0]), None),
    )


def compare(spec: KVSpec, exact: PrefixKV, stored: PrefixKV) -> tuple[LayerErrors, ...]:
    """Layer by layer."""
    valid = (exact.valid, stored.valid)
    return tuple(
        layer_errors(layer, a, b, valid) for layer, a, b in zip(spec.layers, exact.layers, stored.layers, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class StorageCandidate:
    """A codec, ready to encode prefixes of the layout `spec`, whose pictures are in cells of `pool` tokens a side."""

    codec: Codec
    pool: int
    spec: KVSpec


def storage_candidates(
    spec: KVSpec, codecs: Iterable[Codec], samples: Sequence[PrefixKV] = (), *, pools: Sequence[int] = POOLS
) -> list[StorageCandidate]:
    """Every codec, with picture tokens in cells of each size. spec, samples: of prefixes that are not pooled; without
    samples, codecs that are fitted to some are left out."""
    found = []
    for pool in pools:
        try:
            small = dataclasses.replace(spec, layers=tuple(pooled_layer(x, pool, spec.rope) for x in spec.layers))
        except UsageError:  # keys are rotated, and nobody says where tokens stand
            continue
        pooled_samples = [pooled_prefix(spec, sample, pool)[1] for sample in samples]
        found += [
            StorageCandidate(codec=fitted_to(codec, small, pooled_samples), pool=pool, spec=small)
            for codec in codecs
            if samples or not isinstance(codec, FittedCodec)
        ]
    return found


def layer_errors_of(spec: KVSpec, exact: PrefixKV, tried: Sequence[StorageCandidate]) -> list[tuple[LayerErrors, ...]]:
    """Of each candidate, layer by layer. spec, exact: of prefixes that are not pooled."""
    kept = {pool: pooled_prefix(spec, exact, pool)[1] for pool in {candidate.pool for candidate in tried}}
    return [
        compare(spec, exact, round_trip(candidate.codec, candidate.spec, kept[candidate.pool])) for candidate in tried
    ]


def compare_candidates(spec: KVSpec, exact: PrefixKV, tried: Sequence[StorageCandidate]) -> tuple[SettingErrors, ...]:
    """As `layer_errors_of`, the mean over layers."""
    return tuple(
        SettingErrors(
            codec=candidate.codec.name,
            pool=candidate.pool,
            bytes_per_row=bytes_per_row(candidate.spec, candidate.codec),
            attention=float(np.mean([e.attention for e in errors])),
        )
        for candidate, errors in zip(tried, layer_errors_of(spec, exact, tried), strict=True)
    )


def round_trip(codec: Codec, spec: KVSpec, prefix: PrefixKV) -> PrefixKV:
    """What comes back of a prefix that was stored."""
    layers = tuple(
        codec.decode(codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid), layer, rope=spec.rope)
        for kv, layer in zip(prefix.layers, spec.layers, strict=True)
    )
    return PrefixKV(layers, prefix.valid)


def policy_change(policy: Policy, rows: Sequence[Row], exact: PrefixKV, stored: PrefixKV) -> PolicyChange:
    """How the policy's chunks and its loss on the rows' own actions differ between two prefixes of these rows."""
    config = policy.parts.config
    schedule, state = FlowSchedule(shift=config.shift), policy.normalized_state([r.observation() for r in rows])
    noise = policy.initial_noise(len(rows))
    actions = torch.from_numpy(policy.parts.action_normalizer.normalize(np.stack([r.action for r in rows])))
    chunks, losses = [], []
    for prefix in (exact, stored):
        with torch.no_grad():
            chunks.append(integrate(policy.expert, noise, state, prefix, schedule, config.inference_steps))
            batch = Batch(
                prefix=prefix,
                state=state,
                actions=actions[:, None].expand(-1, config.horizon, -1),
                is_pad=torch.arange(config.horizon).expand(len(rows), -1) > 0,  # the row's own action is known
                row=np.array([r.row for r in rows]),
            )
            generator = torch.Generator().manual_seed(0)
            losses.append(float(flow_loss(policy.expert, batch, schedule, 8, generator)))
    change = float((chunks[0] - chunks[1]).square().mean().sqrt())
    return PolicyChange(action=change, exact_loss=losses[0], stored_loss=losses[1])


def _queries(k: Tensor, valid: Tensor | None) -> Tensor:
    """(B, Q, G, D): keys of evenly spaced tokens, of each row's valid ones."""
    rows = []
    for i, row in enumerate(k):
        places = torch.arange(len(row)) if valid is None else torch.nonzero(valid[i])[:, 0]
        spaced = torch.linspace(0, len(places) - 1, _QUERIES).round().long()
        rows.append(row[places[spaced]])
    return torch.stack(rows)


def _attend(queries: Tensor, kv: LayerKV, valid: Tensor | None) -> Tensor:
    """(B, Q, G, D), as the expert attends: one softmax, scale 1 / sqrt(D)."""
    scores = torch.einsum("bqgd,bkgd->bgqk", queries, kv.k) * queries.shape[-1] ** -0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    return torch.einsum("bgqk,bkgd->bqgd", scores.softmax(-1), kv.v)


def _relative(found: Tensor, expected: Tensor, valid: Tensor | None) -> float:
    """Root mean square of the difference over that of what is expected, over valid tokens."""
    keep = torch.ones(()) if valid is None else valid[:, :, None, None]
    error, size = ((x * keep).square().sum() for x in (found - expected, expected))
    return float((error / size.clamp(min=1e-30)).sqrt())

"""Measure how exactly a cache stores its prefixes: errors of keys, of values, and of attention over them.

The reference is the editor's own output for the same rows. Attention is evaluated with queries taken from the layer's
own keys, evenly spaced over its tokens, so that they have realistic sizes and directions. Errors are relative root mean
squares over heads, queries and rows. With a policy, the change of its actions and of its flow loss is measured too.
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
"""Attention queries per row and layer."""
POOLS = (1, 2)
"""Pooling sizes to try, in tokens per side of a cell."""
_BATCH = 8

T = TypeVar("T", "LayerErrors", "SettingErrors", "PolicyChange")


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Relative errors of one layer. k, v: None for pooled tokens, whose keys and values have no counterpart."""

    layer: str
    k: float | None
    v: float | None
    attention: float


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """Effect of the stored numbers on a policy."""

    action: float
    """Root mean square change of the normalized actions."""
    exact_loss: float
    """Flow loss with the editor's own prefixes."""
    stored_loss: float
    """Flow loss with the stored prefixes, on the same noise."""


@dataclass(frozen=True, kw_only=True)
class SettingErrors:
    """Size and error of one way to store the rows."""

    codec: str
    pool: int
    bytes_per_row: int
    attention: float
    """Mean attention error over the layers."""


@dataclass(frozen=True, kw_only=True)
class FidelityResult:
    """Errors of a cache, and of other ways to store the same prefixes."""

    codec: str
    bytes_per_row: int
    rows: int
    """Number of rows that were measured."""
    layers: tuple[LayerErrors, ...]
    """Errors of the cache, layer by layer."""
    settings: tuple[SettingErrors, ...]
    """Errors of the alternatives, smallest size first."""
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
    """Measure `rows` rows, spread over the cache. Results are means over small batches.

    editor: the editor that built the cache.
    """
    spec, count = reader.manifest.spec, min(rows, len(reader))
    chosen = np.linspace(0, len(reader) - 1, count).round().astype(np.int64)
    unpooled = reader.manifest.settings.pool == 1
    codecs = [Registry.installed().codecs.load(entry.name) for entry in Registry.installed().codecs]
    samples = sample_prefixes(editor, dataset, reader.manifest.dataset.stride)
    candidates = storage_candidates(spec, codecs, samples, pools=POOLS if unpooled else (1,))
    layers, settings, changes = [], [], []
    for indices, few in _sampled(reader, dataset, chosen):
        stored = reader.read(indices)
        exact = editor.encode([r.images for r in few], [r.instruction for r in few]).to("cpu", torch.float32)
        layers.append(compare(spec, exact, stored))
        settings.append(compare_candidates(spec, exact, candidates))
        if policy is not None:
            changes.append(policy_change(policy, few, exact, stored))
        on_rows(len(few))
    return FidelityResult(
        codec=reader.manifest.codec,
        bytes_per_row=bytes_per_row(spec, reader.codec),
        rows=count,
        layers=tuple(_mean(same) for same in zip(*layers, strict=True)),
        settings=tuple(
            sorted(
                (_mean(same) for same in zip(*settings, strict=True)),
                key=lambda s: (s.bytes_per_row, s.attention),
            )
        ),
        policy=_mean(changes) if changes else None,
    )


def _sampled(reader: CacheReader, dataset: Dataset, chosen: Indices) -> Iterator[tuple[Indices, list[Row]]]:
    """Yield these rows of the cache with their pictures, in small batches: row indices, and dataset rows."""
    index, origin = reader.index, reader.manifest.dataset
    wanted = {(int(index.row[i]), int(index.variant[i])): int(i) for i in chosen}
    shown = {int(row) for row in index.row[chosen]}
    frames = dataset.rows(episodes=np.unique(index.episode[chosen]).tolist(), stride=origin.stride)
    views = augmented((r for r in frames if r.row in shown), origin.augmentation)
    for few in batches((r for r in views if (r.row, r.variant) in wanted), _BATCH):
        yield np.array([wanted[r.row, r.variant] for r in few]), few


def _mean(same: Sequence[T]) -> T:
    """Average each float field. Other fields (names, sizes, None) are equal in all results and kept."""
    means: dict[str, Any] = {}  # mypy checks `replace` against every field, not only the float ones
    for field in dataclasses.fields(same[0]):
        found = [getattr(x, field.name) for x in same]
        if isinstance(found[0], float):
            means[field.name] = float(np.mean(found))
    return dataclasses.replace(same[0], **means)


def layer_errors(layer: LayerSpec, exact: LayerKV, stored: LayerKV, valid: tuple[Tensor | None, ...]) -> LayerErrors:
    """Compare the stored keys and values of a layer with the exact ones.

    exact, stored: float32 (B, P, G, D); P may differ, because of pooling. valid: bool (B, P) or None, of exact and of
    stored.
    """
    # only layers with text have padding: `valid` says nothing about the tokens of others
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
    """Return the errors of each layer; see `layer_errors`."""
    valid = (exact.valid, stored.valid)
    return tuple(
        layer_errors(layer, a, b, valid) for layer, a, b in zip(spec.layers, exact.layers, stored.layers, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class StorageCandidate:
    """A codec, ready to encode prefixes of the layout `spec`: picture tokens pooled in cells of `pool` x `pool`."""

    codec: Codec
    pool: int
    spec: KVSpec


def storage_candidates(
    spec: KVSpec, codecs: Iterable[Codec], samples: Sequence[PrefixKV] = (), *, pools: Sequence[int] = POOLS
) -> list[StorageCandidate]:
    """Return every combination of codec and pooling.

    spec, samples: layout and values of prefixes that are not pooled. Without samples, codecs that need fitting are
    omitted. Pooling is omitted if the keys are rotated but the positions of their tokens are unknown.
    """
    found = []
    for pool in pools:
        try:
            small = dataclasses.replace(spec, layers=tuple(pooled_layer(x, pool, spec.rope) for x in spec.layers))
        except UsageError:  # keys are rotated, and the layout does not give the tokens' positions
            continue
        pooled_samples = [pooled_prefix(spec, sample, pool)[1] for sample in samples]
        found += [
            StorageCandidate(codec=fitted_to(codec, small, pooled_samples), pool=pool, spec=small)
            for codec in codecs
            if samples or not isinstance(codec, FittedCodec)
        ]
    return found


def layer_errors_of(
    spec: KVSpec, exact: PrefixKV, candidates: Sequence[StorageCandidate]
) -> list[tuple[LayerErrors, ...]]:
    """Return the errors of each candidate, layer by layer. spec, exact: prefixes that are not pooled."""
    kept = {pool: pooled_prefix(spec, exact, pool)[1] for pool in {candidate.pool for candidate in candidates}}
    return [
        compare(spec, exact, round_trip(candidate.codec, candidate.spec, kept[candidate.pool]))
        for candidate in candidates
    ]


def compare_candidates(
    spec: KVSpec, exact: PrefixKV, candidates: Sequence[StorageCandidate]
) -> tuple[SettingErrors, ...]:
    """Return the size of each candidate and its attention error, the mean over layers."""
    return tuple(
        SettingErrors(
            codec=candidate.codec.name,
            pool=candidate.pool,
            bytes_per_row=bytes_per_row(candidate.spec, candidate.codec),
            attention=float(np.mean([e.attention for e in errors])),
        )
        for candidate, errors in zip(candidates, layer_errors_of(spec, exact, candidates), strict=True)
    )


def round_trip(codec: Codec, spec: KVSpec, prefix: PrefixKV) -> PrefixKV:
    """Encode a prefix and decode it again."""
    layers = tuple(
        codec.decode(codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid), layer, rope=spec.rope)
        for kv, layer in zip(prefix.layers, spec.layers, strict=True)
    )
    return PrefixKV(layers, prefix.valid)


def policy_change(policy: Policy, rows: Sequence[Row], exact: PrefixKV, stored: PrefixKV) -> PolicyChange:
    """Compare the policy's action chunks and flow loss under the exact and the stored prefixes of these rows."""
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
                is_pad=torch.arange(config.horizon).expand(len(rows), -1) > 0,  # only the row's own action is known
                row=np.array([r.row for r in rows]),
            )
            generator = torch.Generator().manual_seed(0)
            losses.append(float(flow_loss(policy.expert, batch, schedule, 8, generator)))
    change = float((chunks[0] - chunks[1]).square().mean().sqrt())
    return PolicyChange(action=change, exact_loss=losses[0], stored_loss=losses[1])


def _queries(k: Tensor, valid: Tensor | None) -> Tensor:
    """Return the keys of evenly spaced valid tokens of each row, (B, Q, G, D)."""
    rows = []
    for i, row in enumerate(k):
        tokens = torch.arange(len(row)) if valid is None else torch.nonzero(valid[i])[:, 0]
        spaced = torch.linspace(0, len(tokens) - 1, _QUERIES).round().long()
        rows.append(row[tokens[spaced]])
    return torch.stack(rows)


def _attend(queries: Tensor, kv: LayerKV, valid: Tensor | None) -> Tensor:
    """Attend like the expert: one softmax with scale 1 / sqrt(D). Returns (B, Q, G, D)."""
    scores = torch.einsum("bqgd,bkgd->bgqk", queries, kv.k) * queries.shape[-1] ** -0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    return torch.einsum("bgqk,bkgd->bqgd", scores.softmax(-1), kv.v)


def _relative(found: Tensor, expected: Tensor, valid: Tensor | None) -> float:
    """Return the root mean square of found - expected, relative to that of expected, over valid tokens."""
    keep = torch.ones(()) if valid is None else valid[:, :, None, None]
    error, size = ((x * keep).square().sum() for x in (found - expected, expected))
    return float((error / size.clamp(min=1e-30)).sqrt())

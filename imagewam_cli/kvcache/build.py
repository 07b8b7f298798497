"""Building a cache: dataset rows through an editor into shards.

Episodes are grouped into shards beforehand, from the dataset's metadata alone, so that an interrupted build goes on at the
first shard that is missing and ends with the same bytes as an undisturbed one: a shard's content does not depend on what
was computed before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import Dataset, EpisodeInfo, Row
from imagewam_cli.editor import Editor, PrefixKV
from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.codec import Codec
from imagewam_cli.kvcache.manifest import (
    MANIFEST,
    SHARDS,
    TABLE,
    VERSION,
    DatasetEntry,
    Manifest,
    ShardEntry,
    read_manifest,
    write_atomically,
    write_manifest,
)
from imagewam_cli.kvcache.shard import write_shard
from imagewam_cli.kvcache.spec import KVSpec
from imagewam_cli.kvcache.table import FrameTable

_SAMPLES = 4
"""Rows kept with their pictures, one per batch of the first shard."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How a cache is cut and computed; `stride` is the only one that changes which rows it has."""

    stride: int = 1
    batch: int = 32
    shard_mb: float = 256.0

    def __post_init__(self) -> None:
        if self.stride < 1 or self.batch < 1 or self.shard_mb <= 0:
            raise UsageError("stride and batch must be at least 1, the shard size positive")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build will write: episodes per shard, rows, bytes."""

    shards: tuple[tuple[EpisodeInfo, ...], ...]
    rows: int
    bytes_per_row: int

    @property
    def total_bytes(self) -> int:
        return self.rows * self.bytes_per_row


def plan_build(dataset: Dataset, spec: KVSpec, codec: Codec, settings: BuildSettings) -> BuildPlan:
    """Group the episodes into shards of about `shard_mb`."""
    row_bytes = bytes_per_row(spec, codec)
    shards: list[tuple[EpisodeInfo, ...]] = []
    current: list[EpisodeInfo] = []
    size = 0
    for episode in dataset.episodes():
        episode_bytes = _rows_of(episode, settings.stride) * row_bytes
        if current and size + episode_bytes > settings.shard_mb * 1e6:
            shards.append(tuple(current))
            current, size = [], 0
        current.append(episode)
        size += episode_bytes
    if current:
        shards.append(tuple(current))
    rows = sum(_rows_of(e, settings.stride) for shard in shards for e in shard)
    return BuildPlan(shards=tuple(shards), rows=rows, bytes_per_row=row_bytes)


def bytes_per_row(spec: KVSpec, codec: Codec) -> int:
    """Bytes that a row takes in a shard: K and V, a byte per token for `valid`, and four index numbers."""
    return spec.bytes_per_row(codec.bytes_per_number) + spec.tokens + 4 * 8


def build_cache(
    dataset: Dataset,
    editor: Editor,
    out: Path,
    codec: Codec,
    settings: BuildSettings,
    *,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Manifest:
    """Write (or go on writing) the cache `out`. `on_rows(n)` is called after each n rows, and once for those already there.

    Raises:
        CacheError: `out` holds another cache; the message gives both values of what differs.
        UsageError: `out` holds something that is not a cache.
    """
    plan = plan_build(dataset, editor.spec, codec, settings)
    manifest = _start(dataset, editor, out, codec, settings, plan)
    kept = {entry.episodes: entry for entry in manifest.shards if _intact(out, entry)}
    done: list[ShardEntry] = []
    for number, episodes in enumerate(plan.shards):
        numbers = tuple(e.index for e in episodes)
        entry = kept.get(numbers)
        if entry is None:
            name = f"shard-{number:05d}.safetensors"
            encoder = _ShardEncoder(dataset, editor, codec, settings, manifest.instructions)
            tensors = encoder.encode(numbers, on_rows)
            if number == 0:
                write_atomically(out / SAMPLES, Samples.of(encoder.samples).to_bytes())
            size, checksum = write_shard(out / SHARDS / name, tensors)
            rows = len(tensors["row"])
            entry = ShardEntry(file=name, rows=rows, bytes=size, sha256=checksum, episodes=numbers)
            done.append(entry)
            later = [e for e in manifest.shards if e.episodes in kept and e not in done]
            write_manifest(out, dataclasses.replace(manifest, shards=tuple(done + later)))
        else:
            done.append(entry)
            on_rows(entry.rows)
    manifest = dataclasses.replace(manifest, shards=tuple(done))
    write_manifest(out, manifest)
    return manifest


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """The distinct instructions, in order of appearance."""
    return tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))


def _start(
    dataset: Dataset, editor: Editor, out: Path, codec: Codec, settings: BuildSettings, plan: BuildPlan
) -> Manifest:
    """The manifest to go on from: the one that is there, or a new one."""
    info = dataset.info
    table = FrameTable.of(dataset.rows(images=False)).to_bytes()
    fresh = Manifest(
        version=VERSION,
        fingerprint=editor.fingerprint(),
        spec=editor.spec,
        codec=codec.name,
        dataset=DatasetEntry(
            path=str(info.root.resolve()),
            format=info.format,
            identity=info.identity,
            fps=info.fps,
            state_names=info.state_names,
            action_names=info.action_names,
            episodes=info.total_episodes,
            rows=info.total_rows,
            stride=settings.stride,
        ),
        instructions=instructions_of(dataset),
        table_sha256=hashlib.sha256(table).hexdigest(),
        total_rows=plan.rows,
    )
    if (out / MANIFEST).exists():
        existing = read_manifest(out)
        _refuse_other(out, existing, fresh)
        return existing
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} holds something that is not a cache", "choose an empty folder with --out")
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    write_atomically(out / TABLE, table)
    write_manifest(out, fresh)
    return fresh


def _refuse_other(out: Path, existing: Manifest, fresh: Manifest) -> None:
    """Going on with a cache of other contents would mix the two."""
    pairs = [
        ("dataset", existing.dataset.identity[:16], fresh.dataset.identity[:16]),
        ("stride", existing.dataset.stride, fresh.dataset.stride),
        ("dtype", existing.codec, fresh.codec),
        ("editor", existing.fingerprint.get("editor"), fresh.fingerprint.get("editor")),
        ("editor weights", str(existing.fingerprint.get("weights"))[:16], str(fresh.fingerprint.get("weights"))[:16]),
        ("settings", existing.fingerprint.get("settings"), fresh.fingerprint.get("settings")),
        ("prefix layout", existing.spec, fresh.spec),
        ("states or actions", existing.table_sha256[:16], fresh.table_sha256[:16]),
    ]
    for what, there, here in pairs:
        if there != here:
            raise CacheError(
                f"{out} is a cache of another {what}: it has {there}, this build has {here}",
                "choose another folder with --out, or delete this one",
            )


def _intact(out: Path, entry: ShardEntry) -> bool:
    path = out / SHARDS / entry.file
    return path.exists() and path.stat().st_size == entry.bytes


def _rows_of(episode: EpisodeInfo, stride: int) -> int:
    return -(-episode.length // stride)


class _ShardEncoder:
    """Rows of some episodes -> the tensors of a shard; `samples`: a few of the rows, with their pictures."""

    def __init__(
        self, dataset: Dataset, editor: Editor, codec: Codec, settings: BuildSettings, instructions: tuple[str, ...]
    ) -> None:
        self.dataset, self.editor, self.codec, self.settings = dataset, editor, codec, settings
        self.number_of = {instruction: i for i, instruction in enumerate(instructions)}
        self.samples: list[Row] = []

    def encode(self, episodes: Sequence[int], on_rows: Callable[[int], None]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for rows in _batches(self.dataset.rows(episodes=episodes, stride=self.settings.stride), self.settings.batch):
            for name, values in self._batch(rows).items():
                parts.setdefault(name, []).append(values)
            if len(self.samples) < _SAMPLES:
                self.samples.append(rows[len(rows) // 2])
            on_rows(len(rows))
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    def _batch(self, rows: list[Row]) -> dict[str, Tensor]:
        prefix = self.editor.encode([r.images for r in rows], [r.instruction for r in rows])
        _check(prefix, self.editor.spec)
        tensors = {}
        for i, kv in enumerate(prefix.layers):
            tensors[f"layer.{i}.k"] = self.codec.encode(kv.k).cpu()
            tensors[f"layer.{i}.v"] = self.codec.encode(kv.v).cpu()
        if prefix.valid is not None:
            tensors["valid"] = prefix.valid.cpu()
        numbers = {
            "row": [r.row for r in rows],
            "episode": [r.episode for r in rows],
            "frame": [r.frame for r in rows],
            "instruction": [self.number_of[r.instruction] for r in rows],
        }
        return tensors | {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}


def _check(prefix: PrefixKV, spec: KVSpec) -> None:
    """An editor that does not keep to its own layout is stopped before it fills a disk."""
    for kv, layer in zip(prefix.layers, spec.layers, strict=True):
        expected = (layer.tokens, layer.kv_heads, layer.head_dim)
        if tuple(kv.k.shape[1:]) != expected or kv.k.shape != kv.v.shape:
            raise CacheError(f"layer {layer.name}: the editor gave {tuple(kv.k.shape[1:])}, its spec says {expected}")
        if not bool(torch.isfinite(kv.k).all() & torch.isfinite(kv.v).all()):
            raise CacheError(f"layer {layer.name}: the editor gave numbers that are not finite")


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

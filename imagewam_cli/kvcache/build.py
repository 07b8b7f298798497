"""Building a cache: dataset rows through an editor into shards.

Episodes are grouped into shards beforehand, from the dataset's metadata alone, so that an interrupted build goes on at
the first shard that is missing and ends with the same bytes as an undisturbed one: a shard's content does not depend on
what was computed before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec
from imagewam_cli.kvcache.table import FrameTable

_SAMPLES = 4
"""Rows kept with their pictures, one per batch of the first shard."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How a cache is cut and computed; `stride` is the only one that changes which rows it has."""

    stride: int = 1
    batch: int = 16
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
    return spec.bytes_per_row(codec.bytes_per_number) + spec.valid_tokens + 4 * 8


def build_cache(
    dataset: Dataset,
    editor: Editor,
    out: Path,
    codec: Codec,
    settings: BuildSettings,
    *,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Manifest:
    """Write (or go on writing) the cache `out`. `on_rows(n)` is called after each n rows, and once for those already
    there.

    Raises:
        CacheError: `out` holds another cache; the message gives both values of what differs. Or the editor does not
            keep to its own layout, or gives numbers that the codec cannot hold.
        UsageError: `out` holds something that is not a cache.
    """
    plan = plan_build(dataset, editor.spec, codec, settings)
    manifest = _start(dataset, editor, out, codec, settings, plan)
    if plan.shards and not (out / SAMPLES).exists():
        first = dataset.rows(episodes=[e.index for e in plan.shards[0]], stride=settings.stride)
        write_atomically(out / SAMPLES, Samples.of(sample_rows(first, settings.batch)).to_bytes())
    kept = {entry.file: entry for entry in manifest.shards if _intact(out, entry)}
    cut = _cut(plan)
    missing = [episode for name, numbers in cut.items() if name not in kept for episode in numbers]
    # one stream for all shards: a new one for each would decode a video from its beginning again
    rows = dataset.rows(episodes=missing, stride=settings.stride) if missing else iter(())
    shard_of = {episode: name for name, numbers in cut.items() for episode in numbers}
    # grouped, not counted: a group ends when the row after it was read, so the checks at an episode's end have run
    groups = itertools.groupby(rows, key=lambda row: shard_of[row.episode])
    encoder = _ShardEncoder(editor, codec, settings.batch, manifest.instructions)
    done: list[ShardEntry] = []
    for (name, numbers), episodes in zip(cut.items(), plan.shards, strict=True):
        entry = kept.pop(name, None)
        if entry is None:
            count = sum(_rows_of(episode, settings.stride) for episode in episodes)
            given, group = next(groups, (None, iter(())))
            tensors = encoder.encode(group, on_rows) if given == name else {}
            found = len(tensors.get("row", ()))
            if found != count:
                raise CacheError(
                    f"{_episodes_text(numbers)} should have {count} rows by the dataset's metadata, and {found} came",
                    "the dataset's metadata and its rows do not belong together",
                )
            size, checksum = write_shard(out / SHARDS / name, tensors)
            entry = ShardEntry(file=name, rows=count, bytes=size, sha256=checksum, episodes=numbers)
            done.append(entry)
            write_manifest(out, dataclasses.replace(manifest, shards=(*done, *kept.values())))
        else:
            done.append(entry)
            on_rows(entry.rows)
    manifest = dataclasses.replace(manifest, shards=tuple(done))
    write_manifest(out, manifest)
    return manifest


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """The distinct instructions, in order of appearance."""
    return tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))


def dataset_entry(dataset: Dataset, stride: int) -> DatasetEntry:
    """What is written down of a dataset of which every `stride`-th frame is taken."""
    info = dataset.info
    return DatasetEntry(
        path=str(info.root.resolve()),
        format=info.format,
        identity=info.identity,
        fps=info.fps,
        state_names=info.state_names,
        action_names=info.action_names,
        episodes=info.total_episodes,
        rows=info.total_rows,
        stride=stride,
    )


def sample_rows(rows: Iterator[Row], batch: int) -> list[Row]:
    """A few rows with their pictures: the middle one of each of the first batches."""
    return [taken[len(taken) // 2] for taken in islice(_batches(rows, batch), _SAMPLES)]


def _start(
    dataset: Dataset, editor: Editor, out: Path, codec: Codec, settings: BuildSettings, plan: BuildPlan
) -> Manifest:
    """The manifest to go on from: the one that is there, or a new one."""
    table = FrameTable.of(dataset.rows(images=False)).to_bytes()
    fresh = Manifest(
        version=VERSION,
        fingerprint=editor.fingerprint(),
        spec=editor.spec,
        codec=codec.name,
        dataset=dataset_entry(dataset, settings.stride),
        instructions=instructions_of(dataset),
        table_sha256=hashlib.sha256(table).hexdigest(),
        total_rows=plan.rows,
    )
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        _refuse_other(out, manifest, fresh)
        _refuse_other_cut(out, manifest, plan)
    elif out.exists() and any(path.name != f"{MANIFEST}.partial" for path in out.iterdir()):
        raise UsageError(f"{out} holds something that is not a cache", "choose an empty folder with --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        manifest = fresh
        write_manifest(out, manifest)  # first of all, so that a build stopped from here on is known as one
    (out / SHARDS).mkdir(exist_ok=True)
    if not _holds(out / TABLE, table):
        write_atomically(out / TABLE, table)
    return manifest


def _refuse_other(out: Path, existing: Manifest, fresh: Manifest) -> None:
    """Going on with a cache of other contents would mix the two."""
    pairs = [
        ("dataset", existing.dataset.identity[:16], fresh.dataset.identity[:16]),
        ("stride", existing.dataset.stride, fresh.dataset.stride),
        ("dtype", existing.codec, fresh.codec),
        ("editor", existing.fingerprint.get("editor"), fresh.fingerprint.get("editor")),
        ("editor weights", str(existing.fingerprint.get("weights"))[:16], str(fresh.fingerprint.get("weights"))[:16]),
        *_setting_pairs(existing, fresh),
        ("editor recipe", existing.fingerprint.get("recipe"), fresh.fingerprint.get("recipe")),
        ("prefix layout", existing.spec, fresh.spec),
        ("states or actions", existing.table_sha256[:16], fresh.table_sha256[:16]),
    ]
    for what, there, here in pairs:
        if there != here:
            raise CacheError(
                f"{out} is a cache of another {what}: it has {there}, this build has {here}",
                "choose another folder with --out, or delete this one",
            )


def _setting_pairs(existing: Manifest, fresh: Manifest) -> list[tuple[str, object, object]]:
    there, here = (dict(m.fingerprint.get("settings") or {}) for m in (existing, fresh))
    return [(f"setting {key!r}", there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys())]


def _refuse_other_cut(out: Path, existing: Manifest, plan: BuildPlan) -> None:
    """Shards of another size share names with those of this build and would be overwritten."""
    planned = _cut(plan)
    for entry in existing.shards:
        if planned.get(entry.file) != entry.episodes:
            raise CacheError(
                f"{out} is cut into other shards: its {entry.file} holds {_episodes_text(entry.episodes)}, "
                f"this build would put {_episodes_text(planned.get(entry.file, ()))} there",
                "use the same --shard-mb as before, or choose another folder with --out",
            )


def _cut(plan: BuildPlan) -> dict[str, tuple[int, ...]]:
    """File name -> episodes of each shard."""
    return {f"shard-{i:05d}.safetensors": tuple(e.index for e in shard) for i, shard in enumerate(plan.shards)}


def _episodes_text(episodes: Sequence[int]) -> str:
    return f"episodes {episodes[0]} to {episodes[-1]}" if episodes else "no episode"


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _intact(out: Path, entry: ShardEntry) -> bool:
    path = out / SHARDS / entry.file
    return path.exists() and path.stat().st_size == entry.bytes


def _rows_of(episode: EpisodeInfo, stride: int) -> int:
    return -(-episode.length // stride)


class _ShardEncoder:
    """The rows of a shard -> its tensors."""

    def __init__(self, editor: Editor, codec: Codec, batch: int, instructions: tuple[str, ...]) -> None:
        self.editor, self.codec, self.batch = editor, codec, batch
        self.number_of = {instruction: i for i, instruction in enumerate(instructions)}

    def encode(self, rows: Iterator[Row], on_rows: Callable[[int], None]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for batch in _batches(rows, self.batch):
            for name, values in self._batch(batch).items():
                parts.setdefault(name, []).append(values)
            on_rows(len(batch))
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    def _batch(self, rows: list[Row]) -> dict[str, Tensor]:
        prefix = self.editor.encode([r.images for r in rows], [r.instruction for r in rows])
        spec = self.editor.spec
        check_prefix(prefix, spec, len(rows))
        tensors = {}
        for i, (kv, layer) in enumerate(zip(prefix.layers, spec.layers, strict=True)):
            tensors[f"layer.{i}.k"] = self._stored(kv.k, layer)
            tensors[f"layer.{i}.v"] = self._stored(kv.v, layer)
        if spec.valid_tokens:
            everywhere = torch.ones(len(rows), spec.valid_tokens, dtype=torch.bool)
            tensors["valid"] = everywhere if prefix.valid is None else prefix.valid.cpu()
        numbers = {
            "row": [r.row for r in rows],
            "episode": [r.episode for r in rows],
            "frame": [r.frame for r in rows],
            "instruction": [self.number_of[r.instruction] for r in rows],
        }
        return tensors | {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}

    def _stored(self, values: Tensor, layer: LayerSpec) -> Tensor:
        stored = self.codec.encode(values)
        if not bool(torch.isfinite(self.codec.decode(stored)).all()):
            raise CacheError(
                f"layer {layer.name}: numbers up to {float(values.abs().max()):.3g} do not fit {self.codec.name}",
                "store them in another --dtype, in another folder",
            )
        return stored.cpu()


def check_prefix(prefix: PrefixKV, spec: KVSpec, rows: int) -> None:
    """Stop an editor that does not keep to its own layout, before it fills a disk or a model learns from it.

    Raises:
        CacheError: names the layer, what was given and what the layout says.
    """
    if len(prefix.layers) != len(spec.layers):
        raise CacheError(f"the editor gave {len(prefix.layers)} layers, its spec says {len(spec.layers)}")
    for kv, layer in zip(prefix.layers, spec.layers, strict=True):
        expected = (rows, layer.tokens, layer.kv_heads, layer.head_dim)
        for part, values in (("K", kv.k), ("V", kv.v)):
            given = tuple(values.shape)
            if given != expected:
                raise CacheError(f"layer {layer.name}: the editor gave {part} of {given}, its spec says {expected}")
            if not bool(torch.isfinite(values).all()):
                raise CacheError(f"layer {layer.name}: the editor gave {part} with numbers that are not finite")
    if prefix.valid is not None and tuple(prefix.valid.shape) != (rows, spec.valid_tokens):
        raise CacheError(
            f"the editor gave `valid` of {tuple(prefix.valid.shape)}, its spec says {(rows, spec.valid_tokens)}"
        )


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

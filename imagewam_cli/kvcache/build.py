"""Building a cache: dataset rows through an editor into shards.

Episodes are grouped into shards beforehand, from the dataset's metadata alone, so that an interrupted build goes on at
the first shard that is missing and ends with the same bytes as an undisturbed one: a shard's content does not depend on
what was computed before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import Dataset, EpisodeInfo, Row
from imagewam_cli.editor import Editor, PrefixKV
from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.codec import Codec, all_finite, stored_parts
from imagewam_cli.kvcache.lock import LOCK, write_lock
from imagewam_cli.kvcache.manifest import (
    MANIFEST,
    SHARDS,
    TABLE,
    VERSION,
    DatasetEntry,
    Manifest,
    ShardEntry,
    Share,
    has_checksum,
    part_manifests,
    read_manifest_file,
    write_atomically,
    write_manifest,
)
from imagewam_cli.kvcache.shard import INDEX_BYTES, Shard, ShardWriter
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec
from imagewam_cli.kvcache.table import FrameTable

_SAMPLED = (8, 24, 40, 56)
"""Which of the first rows are kept with their pictures."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How a cache is cut and computed; `stride` is the only one that changes which rows it has."""

    stride: int = 1
    batch: int = 16
    shard_mb: float = 256.0
    share: Share | None = None
    """Build only this part of the shards; the other parts are other workers'."""

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
    """Bytes that a row takes in a shard: K and V, a byte per token for `valid`, and the index."""
    return sum(part.row_bytes for part in stored_parts(spec, codec).values()) + INDEX_BYTES


def build_cache(
    dataset: Dataset,
    editor: Editor,
    out: Path,
    codec: Codec,
    settings: BuildSettings,
    *,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_damage: Callable[[str], None] = lambda file: None,
) -> Manifest:
    """Write (or go on writing) the cache `out`. `on_rows(n)` is called after each n rows, and once for those already
    there; `on_damage(file)` for each shard that was finished and is not what it was: it is built again.

    Raises:
        CacheError: `out` holds another cache; the message gives both values of what differs. Or somebody else writes
            there, or the disk has no room, or the editor does not keep to its own layout, or gives numbers that the
            codec cannot hold.
        UsageError: `out` holds something that is not a cache.
    """
    plan = plan_build(dataset, editor.spec, codec, settings)
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    name = MANIFEST if settings.share is None else settings.share.manifest
    with write_lock(out, LOCK if settings.share is None else f"{LOCK}.{name}"):
        return _Build(dataset, editor, out, codec, settings, plan, on_rows, on_damage).run()


@contextmanager
def _one_worker() -> Iterator[ThreadPoolExecutor]:
    """Ends when the worker has ended, however often Ctrl-C is pressed: the lock is not to go while it writes."""
    worker = ThreadPoolExecutor(max_workers=1)
    try:
        yield worker
    finally:
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                worker.shutdown(wait=True)
                break
            except KeyboardInterrupt as again:
                interrupted = again
        if interrupted is not None:
            raise interrupted


def _ahead(rows: Iterator[Row], count: int, reading: Executor) -> Iterator[Row]:
    """The rows; the next `count` of them are read while one is used."""
    waiting = deque(reading.submit(next, rows, None) for _ in range(count))
    while (row := waiting.popleft().result()) is not None:
        waiting.append(reading.submit(next, rows, None))
        yield row


class _Build:
    """One build under its lock. A finished shard is made durable beside the computation of the next."""

    def __init__(
        self,
        dataset: Dataset,
        editor: Editor,
        out: Path,
        codec: Codec,
        settings: BuildSettings,
        plan: BuildPlan,
        on_rows: Callable[[int], None],
        on_damage: Callable[[str], None],
    ) -> None:
        self.dataset, self.editor, self.out, self.codec = dataset, editor, out, codec
        self.settings, self.plan, self.on_rows = settings, plan, on_rows
        cut = _cut(plan)
        own = list(cut) if settings.share is None else settings.share.of(list(cut))
        self.cut = {name: cut[name] for name in own}
        self._rows = {e.index: _rows_of(e, settings.stride) for shard in plan.shards for e in shard}
        self.name = MANIFEST if settings.share is None else settings.share.manifest
        self.manifest = _start(dataset, editor, out, codec, settings, plan, self.name)
        self.kept = {entry.file: entry for entry in self.manifest.shards if _intact(out, entry)}
        """Shards that are there, by name."""
        for entry in self.manifest.shards:
            if entry.file not in self.kept:
                on_damage(entry.file)

    def run(self) -> Manifest:
        missing = [name for name in self.cut if name not in self.kept]
        _require_room(self.out, sum(self._count(name) for name in missing) * self.plan.bytes_per_row)
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(self.kept.values()))
        for entry in self.manifest.shards:
            self.on_rows(entry.rows)
        with _one_worker() as reading, _one_worker() as writing, _one_worker() as finishing:
            before: Future[None] | None = None
            for name, rows in self._streams(missing, reading):
                writer = self._encoded(name, rows, writing)
                try:
                    if before is not None:
                        before.result()
                except BaseException:
                    writer.close()
                    raise
                before = finishing.submit(self._finish, name, writer)
            if before is not None:
                before.result()
        write_manifest(self.out, self.manifest, self.name)
        return self.manifest

    def _streams(self, missing: Sequence[str], reading: Executor) -> Iterator[tuple[str, Iterator[Row]]]:
        """Shard by shard, its rows: one stream for all, as a new one would decode a video from its beginning again."""
        shard_of = {episode: name for name in missing for episode in self.cut[name]}
        rows = self.dataset.rows(episodes=list(shard_of), stride=self.settings.stride) if missing else iter(())
        # grouped, not counted: a group ends when the row after it was read, so the checks at an episode's end have run
        groups = itertools.groupby(_ahead(rows, self.settings.batch, reading), key=lambda row: shard_of[row.episode])
        for name in missing:
            given, group = next(groups, (None, iter(())))
            yield name, group if given == name else iter(())

    def _encoded(self, name: str, rows: Iterator[Row], writing: Executor) -> ShardWriter:
        """Encode and write the rows of a shard, all but its end; a batch is written while the next one is computed."""
        numbers = {text: i for i, text in enumerate(self.manifest.instructions)}
        count = self._count(name)
        writer = ShardWriter(self.out / SHARDS / name, count, stored_parts(self.editor.spec, self.codec))
        before: Future[None] | None = None
        try:
            for batch in batches(rows, self.settings.batch):
                encoded = encode_rows(self.editor, self.codec, batch, numbers)
                if before is not None:
                    before.result()
                before = writing.submit(writer.append, *encoded)
                self.on_rows(len(batch))
            if before is not None:
                before.result()
        except BaseException:
            writing.submit(writer.close)  # behind what is being written
            raise
        return writer

    def _finish(self, name: str, writer: ShardWriter) -> None:
        """Make the shard durable, then known."""
        with writer:
            checksum = writer.finish()
        self.kept[name] = ShardEntry(
            file=name,
            rows=writer.rows,
            bytes=writer.bytes,
            checksum=checksum,
            episodes=self.cut[name],
            batch=self.settings.batch,
        )
        entries = tuple(self.kept[name] for name in self.cut if name in self.kept)
        self.manifest = dataclasses.replace(self.manifest, shards=entries)
        write_manifest(self.out, self.manifest, self.name)

    def _count(self, name: str) -> int:
        return sum(self._rows[episode] for episode in self.cut[name])


def encode_rows(
    editor: Editor, codec: Codec, rows: Sequence[Row], numbers: Mapping[str, int]
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """The index columns of these rows, and their tensors as `stored_parts` names them. numbers: of the instructions.

    Raises:
        CacheError: the editor does not keep to its layout, or the codec cannot hold its numbers.
    """
    prefix, spec = editor.encode([r.images for r in rows], [r.instruction for r in rows]), editor.spec
    check_prefix(prefix, spec, len(rows))
    tensors: dict[str, Tensor] = {}
    for i, (kv, layer) in enumerate(zip(prefix.layers, spec.layers, strict=True)):
        stored = codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid)
        _require_held(stored, kv, layer, codec)
        tensors |= {f"layer.{i}.{name}": tensor.cpu() for name, tensor in stored.items()}
    if spec.valid_tokens:
        everywhere = torch.ones(len(rows), spec.valid_tokens, dtype=torch.bool)
        tensors["valid"] = everywhere if prefix.valid is None else prefix.valid.cpu()
    index = {
        "row": [r.row for r in rows],
        "episode": [r.episode for r in rows],
        "frame": [r.frame for r in rows],
        "instruction": [numbers[r.instruction] for r in rows],
    }
    return index, tensors


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """The distinct instructions, in order of appearance."""
    return tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))


def _refuse_foreign(out: Path) -> None:
    """Files that are not a cache's stay alone in their folder."""
    if not out.exists() or (out / MANIFEST).exists() or part_manifests(out):
        return
    # what other parts of this cache write as they begin is no stranger
    if any(not path.name.startswith(("manifest.", LOCK)) for path in out.iterdir()):
        raise UsageError(f"{out} holds something that is not a cache", "choose an empty folder with --out")


def dataset_entry(dataset: Dataset, cameras: Sequence[str], stride: int) -> DatasetEntry:
    """What is written down of a dataset of which every `stride`-th frame is taken. cameras: those that are seen."""
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
        keys=dataclasses.replace(info.keys, cameras=tuple(cameras)),
    )


def _start(
    dataset: Dataset, editor: Editor, out: Path, codec: Codec, settings: BuildSettings, plan: BuildPlan, name: str
) -> Manifest:
    """The manifest to go on from: the one of this name that is there, or a new one."""
    existing = read_manifest_file(out / name) if (out / name).exists() else None
    table, instructions = FrameTable.of(dataset.rows(images=False))
    contents = {TABLE: table.to_bytes()}
    samples = existing.files.get(SAMPLES, "") if existing is not None else ""
    kept = {SAMPLES: samples} if has_checksum(out / SAMPLES, samples) else {}
    if plan.shards and not kept:
        contents[SAMPLES] = samples_bytes(dataset, settings.stride)
    fresh = Manifest(
        version=VERSION,
        fingerprint=editor.fingerprint(),
        spec=editor.spec,
        codec=codec.name,
        dataset=dataset_entry(dataset, editor.spec.cameras, settings.stride),
        instructions=instructions,
        files=kept | {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items()},
        total_rows=plan.rows,
    )
    if existing is not None:
        _refuse_other(out, existing, fresh)
        _refuse_other_cut(out, existing, plan)
    else:
        write_manifest(out, fresh, name)  # first of all, so that a build stopped from here on is known as one
    (out / SHARDS).mkdir(exist_ok=True)
    for name, content in contents.items():
        if not _holds(out / name, content):
            write_atomically(out / name, content)
    return existing or fresh


def _refuse_other(out: Path, existing: Manifest, fresh: Manifest) -> None:
    """Going on with a cache of other contents would mix the two."""
    pairs = [
        ("dataset", existing.dataset.identity[:16], fresh.dataset.identity[:16]),
        ("stride", existing.dataset.stride, fresh.dataset.stride),
        ("codec", existing.codec, fresh.codec),
        ("editor", existing.fingerprint.get("editor"), fresh.fingerprint.get("editor")),
        ("editor weights", str(existing.fingerprint.get("weights"))[:16], str(fresh.fingerprint.get("weights"))[:16]),
        *_setting_pairs(existing, fresh),
        ("editor recipe", existing.fingerprint.get("recipe"), fresh.fingerprint.get("recipe")),
        ("prefix layout", existing.spec, fresh.spec),
        ("states or actions", existing.files.get(TABLE), fresh.files[TABLE]),
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
    """Whether the shard is there, with its size and its head; its rows are for `verify` to look at."""
    try:
        Shard.open(out / SHARDS / entry.file).require_listed(entry.bytes, entry.checksum)
        return True
    except CacheError:
        return False


def _require_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CacheError(
            f"the cache needs {needed / 1e9:.1f} GB more, {out} has {free / 1e9:.1f} GB free",
            "choose another --out, a smaller --codec, or fewer --layers, --segments or rows (--stride)",
        )


def _rows_of(episode: EpisodeInfo, stride: int) -> int:
    return -(-episode.length // stride)


def samples_bytes(dataset: Dataset, stride: int) -> bytes:
    """The file of samples: a few of the first rows, with their pictures."""
    first = list(islice(dataset.rows(stride=stride), _SAMPLED[-1] + 1))
    return Samples.of([first[i] for i in _SAMPLED if i < len(first)] or first[-1:]).to_bytes()


def _require_held(stored: Mapping[str, Tensor], kv: LayerKV, layer: LayerSpec, codec: Codec) -> None:
    for tensor in stored.values():
        if tensor.is_floating_point() and not all_finite(tensor):
            greatest = max(float(x.abs().max()) for x in (kv.k, kv.v))
            raise CacheError(
                f"layer {layer.name}: numbers up to {greatest:.3g} do not fit {codec.name}",
                "store them with another --codec, in another folder",
            )


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
            if not all_finite(values):
                raise CacheError(f"layer {layer.name}: the editor gave {part} with numbers that are not finite")
    if prefix.valid is not None and tuple(prefix.valid.shape) != (rows, spec.valid_tokens):
        raise CacheError(
            f"the editor gave `valid` of {tuple(prefix.valid.shape)}, its spec says {(rows, spec.valid_tokens)}"
        )


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows, `size` at a time."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""Plan the shards, rows and bytes of a build from the dataset's metadata and the prefix layout.

Episodes are assigned to shards in advance, so a shard does not depend on what was computed before it. An interrupted
build resumes at the first missing shard and ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagewam_cli.data.augmentation import NO_AUGMENTATION, Augmentation
from imagewam_cli.data.types import Dataset, EpisodeInfo
from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.prefix import stored_parts
from imagewam_cli.kvcache.format.manifest import (
    BuildPart,
)
from imagewam_cli.kvcache.format.shard import INDEX_BYTES
from imagewam_cli.prefix.spec import KVSpec


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of a build: shard size, batch size and part; `stride` and `augmentation` decide the rows of the
    cache."""

    stride: int = 1
    augmentation: Augmentation = NO_AUGMENTATION
    batch: int = 16
    shard_mb: float = 256.0
    part: BuildPart | None = None
    """Part of the shards to build, while other machines build the others; None: build all."""

    def __post_init__(self) -> None:
        if self.stride < 1 or self.batch < 1 or self.shard_mb <= 0:
            raise UsageError("stride and batch must be at least 1, and the shard size positive")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Shards, rows and bytes of a build, known before it starts."""

    shards: tuple[tuple[EpisodeInfo, ...], ...]
    """Episodes of each shard."""
    rows: int
    bytes_per_row: int
    instruction_bytes: int
    """Size of everything that is stored once per instruction."""

    @property
    def total_bytes(self) -> int:
        """Size of all rows and instructions, without the headers of the files."""
        return self.rows * self.bytes_per_row + self.instruction_bytes


def plan_build(dataset: Dataset, spec: KVSpec, codec: Codec, settings: BuildSettings) -> BuildPlan:
    """Group the episodes into shards of about `shard_mb`."""
    row_bytes = bytes_per_row(spec, codec)
    shards: list[tuple[EpisodeInfo, ...]] = []
    current: list[EpisodeInfo] = []
    size = 0
    for episode in dataset.episodes():
        episode_bytes = row_count(episode, settings) * row_bytes
        if current and size + episode_bytes > settings.shard_mb * 1e6:
            shards.append(tuple(current))
            current, size = [], 0
        current.append(episode)
        size += episode_bytes
    if current:
        shards.append(tuple(current))
    rows = sum(row_count(e, settings) for shard in shards for e in shard)
    per_instruction = bytes_per_instruction(spec, codec)
    return BuildPlan(
        shards=tuple(shards),
        rows=rows,
        bytes_per_row=row_bytes,
        instruction_bytes=per_instruction * len(instructions_of(dataset)) if per_instruction else 0,
    )


def bytes_per_row(spec: KVSpec, codec: Codec) -> int:
    """Return the bytes of a row in a shard: K and V, one byte per token of `valid`, and the index."""
    return sum(part.row_bytes for part in stored_parts(spec, codec).values()) + INDEX_BYTES


def bytes_per_instruction(spec: KVSpec, codec: Codec) -> int:
    """Return the bytes of a row in the shard of instructions; 0 if the cache has no such shard."""
    parts = stored_parts(spec, codec, by_instruction=True)
    return sum(part.row_bytes for part in parts.values()) + INDEX_BYTES if parts else 0


def assigned_shards(plan: BuildPlan, settings: BuildSettings) -> dict[str, tuple[int, ...]]:
    """Return the shards of this build: file name -> episodes."""
    layout = shard_layout(plan)
    return layout if settings.part is None else {name: layout[name] for name in settings.part.shards_of(list(layout))}


def shard_layout(plan: BuildPlan) -> dict[str, tuple[int, ...]]:
    """Return the episodes of every shard, by file name."""
    return {f"shard-{i:05d}.safetensors": tuple(e.index for e in shard) for i, shard in enumerate(plan.shards)}


def row_count(episode: EpisodeInfo, settings: BuildSettings) -> int:
    """Return the number of cached rows of an episode: (frames / stride, rounded up) x views."""
    return -(-episode.length // settings.stride) * settings.augmentation.variants

"""`manifest.json`: what a cache is, which shards it has, and what it was made of.

The manifest is written anew (temporary file, then rename) after each finished shard, so a cache is readable while it
grows and an interrupted build is continued. File names in it never leave the cache's folder. Its last value is a
checksum of its own bytes, so that no byte of a cache can change unseen.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data.augmentation import AS_RECORDED, Augmentation
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import CacheError, ConfigError, UsageError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.provenance import Difference, Provenance, fingerprint_digest
from imagewam_cli.prefix.spec import KVSpec

VERSION = 2
MANIFEST = "manifest.json"
TABLE = "table.safetensors"
CODEC = "codec.safetensors"
"""File of a codec that is fitted to the cache's rows."""
INSTRUCTIONS = "instructions.safetensors"
"""A shard with one row per instruction, stored beside the others."""
SHARDS = "shards"
CHECKSUM = "checksum"
_NO_CHECKSUM = 32 * "0"
_PART = re.compile(r"manifest\.part-(\d{5})-of-(\d{5})\.json")
_ONE_FIT = "machines fit a codec differently: start one part first, and the others once codec.safetensors is stored"
_REBUILD = "build the cache again into another folder"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard: rows of whole episodes, in order."""

    file: str
    rows: int
    bytes: int
    checksum: str
    """XXH3-128 of the file's head: its header and index, which has a checksum of each row."""
    episodes: tuple[int, ...]
    batch: int
    """Rows of a forward pass, counted from the shard's first row: the same batches give the same bytes."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """The dataset that a cache was made of."""

    path: str
    format: str
    identity: str
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    episodes: int
    rows: int
    stride: int
    keys: KeyMap
    """With the cameras that the editor sees."""
    augmentation: Augmentation = AS_RECORDED
    """A cache has `variants` rows for each frame that it takes."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache is: see docs/reference/cache-format.md. It grows by one shard at a time."""

    version: int
    fingerprint: Mapping[str, Any]
    spec: KVSpec
    codec: str
    dataset: DatasetEntry
    instructions: tuple[str, ...]
    """Distinct instructions; a shard's rows name theirs by index."""
    files: Mapping[str, str]
    """XXH3-128 of the files beside the shards, by name, in its order."""
    total_rows: int
    """Number of rows in the finished cache."""
    shards: tuple[ShardEntry, ...] = ()
    by_instruction: ShardEntry | None = None
    """The shard with a row for each instruction; None where no layer follows from the instruction alone."""

    @property
    def rows(self) -> int:
        """Number of rows in finished shards."""
        return sum(s.rows for s in self.shards)

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """Entries of all files in the folder of shards."""
        return (*((self.by_instruction,) if self.by_instruction is not None else ()), *self.shards)

    def with_entry(self, entry: ShardEntry) -> Manifest:
        """Return the manifest with another entry for a file that it lists."""
        if self.by_instruction is not None and entry.file == self.by_instruction.file:
            return dataclasses.replace(self, by_instruction=entry)
        return dataclasses.replace(self, shards=tuple(entry if e.file == entry.file else e for e in self.shards))

    @property
    def complete(self) -> bool:
        """Whether all rows are built."""
        return self.rows == self.total_rows

    @property
    def provenance(self) -> Provenance:
        """What the cache was made of."""
        return Provenance(
            dataset=self.dataset.identity,
            stride=self.dataset.stride,
            augmentation=self.dataset.augmentation,
            keys=self.dataset.keys,
            codec=self.codec,
            fingerprint=self.fingerprint,
            spec=self.spec,
            table=self.files.get(TABLE, ""),
        )

    @property
    def settings(self) -> PrefixOptions:
        """The editor's settings."""
        return settings_of(self.fingerprint)

    @property
    def digest(self) -> str:
        """16 hex digits over the fingerprint: equal digests mean interchangeable prefixes."""
        return fingerprint_digest(self.fingerprint)


def settings_of(fingerprint: Mapping[str, Any]) -> PrefixOptions:
    """The editor's settings, as a fingerprint has them."""
    return from_dict(PrefixOptions, fingerprint["settings"], source="fingerprint")


@dataclass(frozen=True, kw_only=True)
class BuildPart:
    """Part `index` (from 0) of `count` of a cache whose parts are built independently."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"there is no part {self.index} of {self.count}", "parts of N are 0/N to N-1/N")

    @classmethod
    def named(cls, manifest: str) -> BuildPart:
        """The part whose shards are listed in the file of this name.

        Raises:
            ValueError: the name is no part's.
        """
        found = _PART.fullmatch(manifest)
        if found is None:
            raise ValueError(f"{manifest} is not the name of a part's manifest")
        return cls(index=int(found[1]), count=int(found[2]))

    @property
    def manifest(self) -> str:
        """The file that lists the part's shards."""
        return f"manifest.part-{self.index:05d}-of-{self.count:05d}.json"

    def of(self, names: Sequence[str]) -> list[str]:
        """Return the shards of this part: consecutive ones, so that it decodes few videos."""
        first, last = (len(names) * i // self.count for i in (self.index, self.index + 1))
        return list(names[first:last])


def part_manifests(names: Collection[str]) -> list[str]:
    """Return the manifests of parts that are not merged, in order."""
    return sorted(name for name in names if _PART.fullmatch(name))


def manifest_names(names: Collection[str]) -> list[str]:
    """Return the names of a cache's manifests: that of the whole cache, if any, then those of parts."""
    return [*([MANIFEST] if MANIFEST in names else []), *part_manifests(names)]


def unite(parts: Sequence[tuple[str, Manifest]]) -> Manifest:
    """Unite the manifests of parts, whose shards may overlap. parts: address for messages, and manifest.

    Raises:
        CacheError: they differ in more than their shards, or in a shard that both have.
    """
    first_path, first = parts[0]
    shards: dict[str, ShardEntry] = {}
    shard_of: dict[int, str] = {}
    for path, manifest in parts:
        for found in (*first.provenance.differences(manifest.provenance), *_other_differences(first, manifest)):
            raise CacheError(
                f"{first_path} and {path} are of different caches: {found.what} is {found.there} and {found.here}",
                _ONE_FIT if found.what == CODEC else "merge parts that the same command built",
            )
        for entry in manifest.entries:
            if shards.setdefault(entry.file, entry) != entry:
                raise CacheError(f"{path} has another {entry.file} than the parts before it", "build one of them again")
            for episode in entry.episodes:
                if shard_of.setdefault(episode, entry.file) != entry.file:
                    raise CacheError(
                        f"{path} has episode {episode} in {entry.file}, a part before it in {shard_of[episode]}",
                        "build all parts with the same --shard-mb",
                    )
    by_instruction = shards.pop(INSTRUCTIONS, None)
    return dataclasses.replace(
        first,
        files=dict(sorted({name: c for _, manifest in parts for name, c in manifest.files.items()}.items())),
        shards=tuple(shards[name] for name in sorted(shards)),
        by_instruction=by_instruction,
    )


def _other_differences(first: Manifest, other: Manifest) -> Iterator[Difference]:
    """What else all parts of one cache have in common, beside their provenance and apart from their shards."""
    # the same dataset may be mounted elsewhere on another machine
    there, here = (to_dict(dataclasses.replace(m.dataset, path="")) for m in (first, other))
    pairs = [(f"dataset {key}", there[key], here[key]) for key in there]
    pairs += [
        ("the list of instructions", first.instructions, other.instructions),
        ("the number of rows", first.total_rows, other.total_rows),
    ]
    # a part that has only begun does not list every file yet
    pairs += [(name, first.files[name], other.files[name]) for name in first.files.keys() & other.files.keys()]
    yield from (Difference(what, old, new) for what, old, new in pairs if old != new)


def no_cache(place: str) -> CacheError:
    """For a place without a manifest."""
    return CacheError(f"{place} is not a cache: it has no {MANIFEST}", "make one with `imagewam cache`")


def parse_manifest(text: bytes, path: str) -> Manifest:
    """path: where the text stands.

    Raises:
        CacheError: a newer version, damaged, or a name that leaves the folder.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CacheError(f"{path} is damaged: {error}", _REBUILD) from None
    if not isinstance(values, dict):
        raise CacheError(f"{path} is damaged: it is not a mapping", _REBUILD)
    version = values.get("version")
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        raise CacheError(
            f"{path} has version {version!r}; this imagewam reads version {VERSION}",
            _REBUILD if older else "upgrade imagewam",
        )
    checksum = str(values.pop(CHECKSUM, ""))
    if checksum != _checksum(text, checksum):
        raise CacheError(f"{path} is damaged: it differs from its checksum", _REBUILD)
    try:
        manifest = from_dict(Manifest, values, source=path)
    except ConfigError as error:
        raise CacheError(f"{path} is damaged: {error.message}", _REBUILD) from error
    for name in (*(entry.file for entry in manifest.entries), *manifest.files):
        if Path(name).name != name or name in ("", ".."):
            raise CacheError(f"{path} names the file {name!r}, which is not a plain file name", _REBUILD)
    return manifest


def signed(values: Mapping[str, Any]) -> bytes:
    """The JSON of a manifest, its checksum last: XXH3-128 of this text with zeros in the checksum's place."""
    text = dump_json({**values, CHECKSUM: _NO_CHECKSUM}).encode()
    before, place, after = text.rpartition(_NO_CHECKSUM.encode())
    return before + checksum_of(before + place + after).encode() + after


def _checksum(text: bytes, stated: str) -> str:
    """Of a manifest that states this checksum."""
    before, _, after = text.rpartition(stated.encode() or b"\0")
    return checksum_of(before + _NO_CHECKSUM.encode() + after)


def repair_hint(folder: Path | str) -> str:
    """What to do about a damaged cache."""
    return f"run `imagewam cache verify --cache {folder} --repair`"

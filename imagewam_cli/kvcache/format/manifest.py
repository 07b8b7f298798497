"""`manifest.json`: the layout of a cache, its shards, and its provenance.

The manifest is replaced atomically after each finished shard, so a cache is readable while it grows, and an interrupted
build can be resumed. File names in it cannot point outside the cache's folder. Its last value is a checksum of its own
bytes, so every byte of a cache is covered by a checksum.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data.augmentation import NO_AUGMENTATION, Augmentation
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import CacheError, ConfigError, UsageError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.provenance import ALL, Difference, Provenance, fingerprint_digest
from imagewam_cli.prefix.spec import KVSpec

VERSION = 2
MANIFEST = "manifest.json"
TABLE = "table.safetensors"
CODEC = "codec.safetensors"
"""File with the parameters of a codec that is fitted to the dataset."""
DATASET_FILES = "dataset_files.json"
"""File with the size and ends of each file of the dataset (`DatasetFiles`)."""
DATASET_CHECKSUMS = "dataset.sha256"
"""File with the SHA-256 of each file of the dataset, written when the build is finished."""
INSTRUCTIONS = "instructions.safetensors"
"""Shard with one row per instruction."""
SHARDS = "shards"
CHECKSUM = "checksum"
_NO_CHECKSUM = 32 * "0"
_PART_CHECKSUMS = re.compile(r"dataset\.part-(\d{5})-of-(\d{5})\.sha256")
_PART = re.compile(r"manifest\.part-(\d{5})-of-(\d{5})\.json")
_ONE_FIT = (
    "fitting a codec gives different parameters on different machines: "
    "start one part first, and the others when codec.safetensors exists"
)
_REBUILD = "build the cache again into another folder"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard: rows of whole episodes, in order."""

    file: str
    rows: int
    bytes: int
    checksum: str
    """XXH3-128 of the file's head: its header and its index, which holds a checksum of each row."""
    episodes: tuple[int, ...]
    batch: int
    """Rows per forward pass, counted from the shard's first row. Repairing a row with the same batches gives the same
    bytes."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """Description of the dataset that a cache was built from."""

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
    """Features that were read, including the cameras that the editor sees."""
    selected: str | None = None
    """The episodes that were read, such as "0-9,12"; None: all of them."""
    content: str | None = None
    """Digest of the files that hold its rows and pictures (`DatasetFiles.digest`); None if they were not recorded."""
    augmentation: Augmentation = NO_AUGMENTATION
    """Augmentation of the pictures. A cache has `variants` rows per cached frame."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`; see docs/reference/cache-format.md. It grows by one shard at a time."""

    version: int
    fingerprint: Mapping[str, object]
    """The editor's fingerprint: name, weights, settings and recipe."""
    spec: KVSpec
    codec: str
    dataset: DatasetEntry
    instructions: tuple[str, ...]
    """Distinct instructions. Rows of a shard refer to them by index."""
    files: Mapping[str, str]
    """XXH3-128 of each file other than the shards, sorted by name."""
    total_rows: int
    """Number of rows in the finished cache."""
    shards: tuple[ShardEntry, ...] = ()
    by_instruction: ShardEntry | None = None
    """Shard with one row per instruction; None if no layer depends on the instruction alone."""

    @property
    def rows(self) -> int:
        """Number of rows in finished shards."""
        return sum(s.rows for s in self.shards)

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """Entries of all shards, including the one with a row per instruction."""
        return (*((self.by_instruction,) if self.by_instruction is not None else ()), *self.shards)

    def with_entry(self, entry: ShardEntry) -> Manifest:
        """Return the manifest with the entry of the same file replaced."""
        if self.by_instruction is not None and entry.file == self.by_instruction.file:
            return dataclasses.replace(self, by_instruction=entry)
        return dataclasses.replace(self, shards=tuple(entry if e.file == entry.file else e for e in self.shards))

    @property
    def complete(self) -> bool:
        """True if all rows are built."""
        return self.rows == self.total_rows

    @property
    def provenance(self) -> Provenance:
        """Provenance of the stored prefixes, to compare with another cache, run or editor."""
        return Provenance(
            dataset=self.dataset.identity,
            content=self.dataset.content,
            stride=self.dataset.stride,
            augmentation=self.dataset.augmentation,
            keys=self.dataset.keys,
            selected=self.dataset.selected or ALL,
            codec=self.codec,
            fingerprint=self.fingerprint,
            spec=self.spec,
            table=self.files.get(TABLE, ""),
        )

    @property
    def settings(self) -> PrefixOptions:
        """Settings of the editor that built the cache."""
        return settings_of(self.fingerprint)

    @property
    def digest(self) -> str:
        """Digest of the fingerprint, 16 hex digits. Equal digests mean interchangeable prefixes."""
        return fingerprint_digest(self.fingerprint)


def settings_of(fingerprint: Mapping[str, object]) -> PrefixOptions:
    """Read the editor's settings from its fingerprint."""
    return from_dict(PrefixOptions, fingerprint["settings"], source="fingerprint")


@dataclass(frozen=True, kw_only=True)
class BuildPart:
    """One part of a cache whose parts are built independently: number `index`, from 0, of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"part {self.index} of {self.count} does not exist",
                f"valid parts are 0/{self.count} to {self.count - 1}/{self.count}"
                if self.count > 0
                else "write it as 0/N to N-1/N",
            )

    @classmethod
    def named(cls, manifest: str) -> BuildPart:
        """Return the part whose manifest has this file name.

        Raises:
            ValueError: it is not the name of a part's manifest.
        """
        found = _PART.fullmatch(manifest)
        if found is None:
            raise ValueError(f"{manifest} is not the name of a part's manifest")
        return cls(index=int(found[1]), count=int(found[2]))

    @property
    def manifest(self) -> str:
        """File name of the part's manifest."""
        return f"manifest.part-{self.index:05d}-of-{self.count:05d}.json"

    @property
    def dataset_checksums(self) -> str:
        """File name of the SHA-256 of the dataset's files that hold this part's episodes."""
        return f"dataset.part-{self.index:05d}-of-{self.count:05d}.sha256"

    def shards_of(self, names: Sequence[str]) -> list[str]:
        """Return the shards of this part. They are consecutive, so that each part decodes few videos."""
        first, last = (len(names) * i // self.count for i in (self.index, self.index + 1))
        return list(names[first:last])


def is_dataset_checksums(name: str) -> bool:
    """Return whether a file of a cache holds the SHA-256 of files of its dataset."""
    return name == DATASET_CHECKSUMS or _PART_CHECKSUMS.fullmatch(name) is not None


def part_of_checksums(name: str) -> BuildPart | None:
    """Return the part that wrote a file of `is_dataset_checksums`; None: the build of a whole cache."""
    found = _PART_CHECKSUMS.fullmatch(name)
    return None if found is None else BuildPart(index=int(found[1]), count=int(found[2]))


def part_manifests(names: Collection[str]) -> list[str]:
    """Return the file names of parts' manifests, sorted."""
    return sorted(name for name in names if _PART.fullmatch(name))


def manifest_names(names: Collection[str]) -> list[str]:
    """Return the file names of a cache's manifests: the whole cache's, if it exists, then the parts'."""
    return [*([MANIFEST] if MANIFEST in names else []), *part_manifests(names)]


def unite(parts: Sequence[tuple[str, Manifest]]) -> Manifest:
    """Unite the manifests of a cache's parts. A shard may be in several parts.

    parts: address (for messages) and manifest of each part.

    Raises:
        CacheError: the parts belong to different caches, disagree about a shard, or assign an episode to two shards.
    """
    first_path, first = parts[0]
    contents = [manifest.dataset.content for _, manifest in parts]
    known = dataclasses.replace(first.provenance, content=next(filter(None, contents), None))
    shards: dict[str, ShardEntry] = {}
    shard_of: dict[int, str] = {}
    for path, manifest in parts:
        for found in (*known.differences(manifest.provenance), *_other_differences(first, manifest)):
            raise CacheError(
                f"{first_path} and {path} belong to different caches: "
                f"{found.what} is {found.there} in one and {found.here} in the other",
                _ONE_FIT if found.what == CODEC else "merge parts that the same command built",
            )
        for entry in manifest.entries:
            if shards.setdefault(entry.file, entry) != entry:
                raise CacheError(
                    f"{path} and an earlier part list different contents for {entry.file}", "rebuild one of them"
                )
            for episode in entry.episodes:
                if shard_of.setdefault(episode, entry.file) != entry.file:
                    raise CacheError(
                        f"{path} lists episode {episode} in {entry.file}; "
                        f"an earlier part lists it in {shard_of[episode]}",
                        "build all parts with the same --shard-mb",
                    )
    by_instruction = shards.pop(INSTRUCTIONS, None)
    return dataclasses.replace(
        first,
        # the files that an older imagewam read for its part are not known
        dataset=dataclasses.replace(first.dataset, content=None if None in contents else first.dataset.content),
        files=dict(sorted({name: c for _, manifest in parts for name, c in manifest.files.items()}.items())),
        shards=tuple(shards[name] for name in sorted(shards)),
        by_instruction=by_instruction,
    )


def _other_differences(first: Manifest, other: Manifest) -> Iterator[Difference]:
    """Yield the differences between two parts in everything other than provenance and shards."""
    # the dataset may have a different path on each machine; the provenance compares its content
    there, here = (to_dict(dataclasses.replace(m.dataset, path="", content=None)) for m in (first, other))
    pairs = [(f"dataset {key}", there[key], here[key]) for key in there]
    pairs += [
        ("the list of instructions", first.instructions, other.instructions),
        ("the number of rows", first.total_rows, other.total_rows),
    ]
    # an unfinished part may not list every file yet
    pairs += [(name, first.files[name], other.files[name]) for name in first.files.keys() & other.files.keys()]
    yield from (Difference(what, old, new) for what, old, new in pairs if old != new)


def no_cache(address: str) -> CacheError:
    """Return the error for a folder or URL without a manifest."""
    return CacheError(f"{address} is not a cache: it has no {MANIFEST}", "build one with `imagewam cache`")


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Parse and verify a manifest. path: address of the text, for messages.

    Raises:
        CacheError: the version is not supported, the text is damaged, or a file name points outside the folder.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CacheError(f"{path} is damaged: {error}", _REBUILD) from None
    if not isinstance(values, dict):
        raise CacheError(f"{path} is damaged: it is not a JSON object", _REBUILD)
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


def with_checksum(values: Mapping[str, object]) -> bytes:
    """Return a manifest as JSON that ends with its own checksum: XXH3-128 of the text with the checksum zeroed."""
    text = dump_json({**values, CHECKSUM: _NO_CHECKSUM}).encode()
    before, _, after = text.rpartition(_NO_CHECKSUM.encode())
    return before + checksum_of(text).encode() + after


def _checksum(text: bytes, stated: str) -> str:
    """Compute the checksum of a manifest's text. stated: the checksum in the text, which counts as zeros."""
    before, _, after = text.rpartition(stated.encode() or b"\0")
    return checksum_of(before + _NO_CHECKSUM.encode() + after)


def repair_hint(folder: Path | str) -> str:
    """Return the hint for a damaged cache."""
    return f"run `imagewam cache verify --cache {folder} --repair`"

"""Describe what prefixes were made of, and compare two descriptions.

Everything that asks "is this the same dataset, editor and cache?" asks here: resuming and merging a build, repairing a
cache, resuming a run, loading a policy's editor, and workers that build one cache together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from imagewam_cli.config import to_dict
from imagewam_cli.data.augmentation import Augmentation
from imagewam_cli.data.types import KeyMap
from imagewam_cli.prefix.spec import KVSpec

ALL = "all"
"""`Provenance.selected` if every episode was read."""
CONTENT = "files of the dataset"
"""Name of the difference in `Provenance.content`."""
_FORMER = "weights_former"
"""Key of a fingerprint: the digest of its weights as older versions computed it, which counted files that are not used.
Absent if there are no such files."""
_SHORT = 16
"""Number of checksum digits to compare: messages show this many, and `run.json` stores only these."""


@dataclass(frozen=True)
class Difference:
    """One property that differs. what: its name in words; there, here: both values, checksums shortened."""

    what: str
    there: object
    here: object


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that decides the content of stored prefixes. A field that is None is unknown and is not compared."""

    dataset: str | None = None
    """Identity of the dataset; 16 digits are enough."""
    content: str | None = None
    """Digest of the dataset's files; 16 digits are enough."""
    stride: int | None = None
    augmentation: Augmentation | None = None
    keys: KeyMap | None = None
    """Features of the dataset that were read."""
    selected: str | None = None
    """The episodes that were read, such as "0-9,12", or `ALL`."""
    codec: str | None = None
    editor: str | None = None
    fingerprint: Mapping[str, object] | None = None
    """The editor's: name, weights, settings, recipe."""
    digest: str | None = None
    """Digest of the fingerprint, for when the fingerprint itself was not stored."""
    spec: KVSpec | None = None
    table: str | None = None
    """Checksum of all states and actions; 16 digits are enough."""

    def differences(self, other: Provenance) -> tuple[Difference, ...]:
        """Return what differs from `other`, most informative first. `self` is the side called `there`."""
        pairs = [
            *_pair("dataset", self.dataset, other.dataset),
            *_pair("selection of episodes", self.selected, other.selected),
            *_pair("stride", self.stride, other.stride),
            *_pair("augmentation", self.augmentation, other.augmentation),
            *_pair("codec", self.codec, other.codec),
            *_pair("editor", self._editor, other._editor),
            *self._editor_pairs(other),
            *_layout_pair(self.spec, other.spec),
            *_pair("dataset keys", self.keys, other.keys),
            *_pair(CONTENT, self.content, other.content),
            *_pair("states or actions", self.table, other.table),
        ]
        return tuple(
            Difference(what, _shortened(there), _shortened(here))
            for what, there, here in pairs
            if not _equal(there, here)
        )

    def unrecorded(self, other: Provenance) -> tuple[str, ...]:
        """Return what `other` knows and `self` does not, because it was made before that was recorded."""
        pairs = ((CONTENT, self.content, other.content), ("keys of the dataset", self.keys, other.keys))
        return tuple(what for what, there, here in pairs if there is None and here is not None)

    def counted_unused_weights(self, other: Provenance) -> bool:
        """Return whether one of the two was made by an older version, which counted weights that are not used."""
        if self.fingerprint is None or other.fingerprint is None:
            return False
        return _by_former_digest(self.fingerprint, other.fingerprint)

    def _editor_pairs(self, other: Provenance) -> Iterator[tuple[str, object, object]]:
        """Yield (name, there, here) for each entry of the two fingerprints; if one is unknown, for their digests."""
        if self.fingerprint is None or other.fingerprint is None:
            yield from _pair("editor fingerprint", self._digest, other._digest)
            return
        there, here = (_comparable(p.fingerprint) for p in (self, other) if p.fingerprint is not None)
        for key in dict.fromkeys(("weights", "settings", "recipe", *sorted(there.keys() | here.keys()))):
            if key == "settings":
                old, new = _settings(there), _settings(here)
                for name in sorted(old.keys() | new.keys()):
                    yield f"setting {name!r}", old.get(name), new.get(name)
            elif key == "weights" and _by_former_digest(self.fingerprint, other.fingerprint):
                continue
            elif key != "editor":
                yield f"editor {key.replace('_', ' ')}", there.get(key), here.get(key)

    @property
    def _editor(self) -> object:
        return self.editor if self.fingerprint is None else self.fingerprint.get("editor")

    @property
    def _digest(self) -> str | None:
        return self.digest if self.fingerprint is None else fingerprint_digest(self.fingerprint)


def fingerprint_digest(fingerprint: Mapping[str, object]) -> str:
    """Return 16 hex digits of a fingerprint. Equal digests mean interchangeable prefixes."""
    return hashlib.sha256(json.dumps(_comparable(fingerprint), sort_keys=True).encode()).hexdigest()[:16]


def _comparable(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """Return the fingerprint without the revision, because the same weights may come from the Hub or from a folder, and
    without the former digest of the weights."""
    return {key: value for key, value in to_dict(fingerprint).items() if key not in {"revision", _FORMER}}


def _by_former_digest(there: Mapping[str, object], here: Mapping[str, object]) -> bool:
    """Return whether one of two fingerprints has the weights of the other only as its former digest."""
    if there.get("weights") == here.get("weights"):
        return False
    return there.get("weights") == here.get(_FORMER) or here.get("weights") == there.get(_FORMER)


def _settings(fingerprint: Mapping[str, object]) -> Mapping[str, object]:
    """Return the editor's settings in a fingerprint; empty if it has none."""
    settings = fingerprint.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _pair(what: str, there: object, here: object) -> Iterator[tuple[str, object, object]]:
    if there is not None and here is not None:
        yield what, there, here


def _layout_pair(there: KVSpec | None, here: KVSpec | None) -> Iterator[tuple[str, object, object]]:
    """Yield the first value that differs between two layouts. A whole layout is too long for a message."""
    if there is None or here is None or there == here:
        return
    old, new = _leaves(to_dict(there)), _leaves(to_dict(here))
    for path in {**old, **new}:
        if old.get(path) != new.get(path):
            yield "prefix layout", f"{path} {old.get(path)}", f"{path} {new.get(path)}"
            return


def _leaves(value: object, path: str = "") -> dict[str, object]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        return {path: value}
    found: dict[str, object] = {}
    for key, child in children:
        found |= _leaves(child, f"{path}.{key}" if path else str(key))
    return found


def _equal(there: object, here: object) -> bool:
    if isinstance(there, str) and isinstance(here, str):
        # a run stores only the first digits of a checksum
        length = min(len(there), len(here))
        return there == here or (length == _SHORT and there[:length] == here[:length] and len(there) != len(here))
    return there == here


def _shortened(value: object) -> object:
    is_checksum = isinstance(value, str) and len(value) in (32, 64) and set(value) <= set("0123456789abcdef")
    return value[:_SHORT] if is_checksum and isinstance(value, str) else value

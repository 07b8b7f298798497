"""The folder of an ONNX export: its description, `onnx.json`, and its files as they were written.

`onnx.json` lists the size and the SHA-256 of every file that a policy is made of, and of itself. Exports made before
have no such list; they are read as before, with a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = "onnx.json"
VERSION = 1
CHECKSUMS = "checksums"
MIN_ONNXRUNTIME = "min_onnxruntime"
"""Keys of `onnx.json`: file name -> {"bytes", "sha256"}, and the oldest onnxruntime that reads the graphs."""

_KEYS = ("files", "cameras", "horizon", "execute", "fps", "state", "action", "prefix")
_CHUNK = 2**20
_COPY = "copy the whole export folder again, or export the policy again"


class ExportFolderError(ValueError):
    """An export that cannot be used. message: the file and what is wrong with it; hint: what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class ExportFolder:
    """An export whose description was read. description: content of `onnx.json`."""

    path: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> ExportFolder:
        """Read the description. No other file is read.

        Raises:
            ExportFolderError: the description is missing or damaged, or has a different version.
        """
        path = Path(path)
        file = path / DESCRIPTION
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ExportFolderError(f"{path} is no ONNX export: it has no {DESCRIPTION}", _COPY) from None
        except ValueError as error:
            raise ExportFolderError(f"{file} is damaged: {error}", _COPY) from None
        if not isinstance(description, dict):
            raise ExportFolderError(f"{file} is damaged: it is not a mapping", _COPY)
        if description.get("version") != VERSION:
            raise ExportFolderError(
                f"{file} has version {description.get('version')!r}; this reads version {VERSION}",
                "run the export's own policy.py, or a newer imagewam",
            )
        missing = [key for key in _KEYS if key not in description]
        if missing:
            raise ExportFolderError(f"{file} is damaged: it has no key {missing[0]!r}", _COPY)
        execute, horizon = description["execute"], description["horizon"]
        if not (isinstance(execute, int) and isinstance(horizon, int) and 1 <= execute <= horizon):
            raise ExportFolderError(
                f"{file} is damaged: 'execute' is {execute!r}, but it must be from 1 to the horizon, {horizon!r}", _COPY
            )
        return cls(path, description)

    @property
    def file_checksums(self) -> Mapping[str, Mapping[str, Any]]:
        """Size ("bytes") and "sha256" of each file but the description; empty for exports made before."""
        found: Mapping[str, Mapping[str, Any]] = self.description.get(CHECKSUMS, {})
        return {name: entry for name, entry in found.items() if name != DESCRIPTION}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this export."""
        if self.file_checksums:
            return ()
        return (f"{self.path} was made before exports listed checksums, so its files are not checked; export it again",)

    def file(self, role: str) -> Path:
        """Return the file of a role, such as "loop".

        Raises:
            ExportFolderError: the file is missing.
        """
        name = self.description["files"].get(role)
        if name is None:
            raise ExportFolderError(f"{self.path / DESCRIPTION} is damaged: it names no file {role!r}", _COPY)
        path = self.path / str(name)
        if not path.is_file():
            raise ExportFolderError(f"{path} is missing", _COPY)
        return path

    def require_onnxruntime(self, installed: str) -> None:
        """Check the version of the installed onnxruntime.

        Raises:
            ExportFolderError: it is older than the export needs.
        """
        needed = self.description.get(MIN_ONNXRUNTIME)
        if needed is not None and _numbers(installed) < _numbers(needed):
            raise ExportFolderError(
                f"{self.path} needs onnxruntime {needed} or newer, but version {installed} is installed",
                f"pip install 'onnxruntime>={needed}'",
            )

    def verify(self, *, optional: Collection[str] = ()) -> None:
        """Compare all files with their checksums; does nothing for exports made before.

        optional: roles whose files may be missing.

        Raises:
            ExportFolderError: a file is missing or differs; the message names it.
        """
        entry = self.description.get(CHECKSUMS, {}).get(DESCRIPTION)
        if entry is not None and entry.get("sha256") != description_sha256(self.description):
            raise ExportFolderError(
                f"{self.path / DESCRIPTION} was changed after the export, or is damaged",
                f"{_COPY}; if you changed it on purpose, delete its key {CHECKSUMS!r}",
            )
        files = self.description["files"]
        may_miss = {files[role] for role in optional if role in files}
        for name in self.file_checksums:
            if name not in may_miss or (self.path / name).exists():
                damage = self.damage(name, content=True)
                if damage is not None:
                    raise ExportFolderError(f"{self.path / name} {damage}", _COPY)

    def damage(self, name: str, *, content: bool) -> str | None:
        """Return how a listed file differs from the one that was exported, or None. content: also read its bytes."""
        path, entry = self.path / name, self.file_checksums[name]
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"is not the file that was exported: it has {size} bytes instead of {entry['bytes']}"
        if content and file_sha256(path) != entry["sha256"]:
            return "is not the file that was exported: its SHA-256 differs"
        return None


def with_checksums(description: Mapping[str, Any], folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Return a description, as JSON values, that lists the checksums of these files and of itself."""
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in sorted(names)
    }
    listed = {**description, CHECKSUMS: entries}
    return {**listed, CHECKSUMS: {**entries, DESCRIPTION: {"sha256": description_sha256(listed)}}}


def description_sha256(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description without its own entry, independent of its formatting."""
    entries = {name: entry for name, entry in description[CHECKSUMS].items() if name != DESCRIPTION}
    text = json.dumps({**description, CHECKSUMS: entries}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.18.1.dev2" -> (1, 18, 1)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)

"""Find datasets, caches, runs and exports, by default in the folders of these names in the working folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.errors import CacheError, RunError

DATASETS, CACHES, RUNS, EXPORTS = (Path(name) for name in ("datasets", "caches", "runs", "exports"))
DEMONSTRATIONS = DATASETS / "tabletop"

CACHE_MARKER, RUN_MARKER, POLICY_MARKER, ONNX_MARKER = "manifest.json", "run.json", "policy.json", "onnx.json"
DATASET_MARKER, PART_MARKER = "meta/info.json", "manifest.part-*.json"
"""File that identifies each kind of folder. PART_MARKER matches a cache whose parts are not merged yet."""

_KINDS = {
    DATASET_MARKER: "dataset",
    CACHE_MARKER: "cache",
    PART_MARKER: "cache",
    RUN_MARKER: "run",
    ONNX_MARKER: "export",
    POLICY_MARKER: "export",
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One dataset, cache, run or export."""

    kind: str
    path: Path
    bytes: int
    modified: float


def marker_of(folder: Path) -> str | None:
    """Return the marker that identifies the kind of the folder, or None if imagewam did not create the folder."""
    return next((marker for marker in _KINDS if any(folder.glob(marker))), None)


def items(*roots: Path) -> list[Item]:
    """Return everything that imagewam created in `roots` and in their default folders, newest first.

    A root may itself be such a folder. Without roots, look in the working folder.
    """
    found: dict[Path, Item] = {}
    for folder in (folder for root in roots or (Path(),) for folder in _candidates(root)):
        marker = marker_of(folder)
        if marker is not None and folder not in found:
            modified = max(path.stat().st_mtime for path in folder.glob(marker))
            found[folder] = Item(kind=_KINDS[marker], path=folder, bytes=folder_size(folder), modified=modified)
    return sorted(found.values(), key=lambda item: -item.modified)


def newest(kind: str, option: str) -> Path:
    """Return the newest cache in caches/ or run in runs/.

    Args:
        kind: "cache" or "run".
        option: the option that selects a different one, for the hint.

    Raises:
        CacheError, RunError: none exists; the hint names the command that creates one.
    """
    for item in items(CACHES if kind == "cache" else RUNS):
        if item.kind == kind:
            return item.path
    if kind == "cache":
        raise CacheError(
            "there is no cache in caches/", f"build one with `imagewam cache --editor tiny`, or pass {option} FOLDER"
        )
    raise RunError("there is no run in runs/", f"train one with `imagewam train-expert`, or pass {option} FOLDER")


def folder_size(folder: Path) -> int:
    """Return the total size in bytes of all files below the folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _candidates(root: Path) -> Iterator[Path]:
    if marker_of(root) is not None:
        yield root
        return
    for folder in (root, *(root / name for name in (DATASETS, CACHES, RUNS, EXPORTS))):
        yield from (child for child in sorted(folder.glob("*")) if os.access(child, os.R_OK | os.X_OK))

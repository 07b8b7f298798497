"""Where things lie by default: `datasets/`, `caches/`, `runs/`, `exports/` in the working folder, and what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.errors import CacheError, RunError

DATASETS, CACHES, RUNS, EXPORTS = (Path(name) for name in ("datasets", "caches", "runs", "exports"))
DEMONSTRATIONS = DATASETS / "tabletop"

CACHE_MARKER, RUN_MARKER, POLICY_MARKER, ONNX_MARKER = "manifest.json", "run.json", "policy.json", "onnx.json"


@dataclass(frozen=True, kw_only=True)
class Item:
    """A cache, run or export in the working folder."""

    kind: str
    path: Path
    bytes: int
    modified: float


def items(root: Path = Path()) -> list[Item]:
    """Everything made by imagewam under the default folders, newest first."""
    markers = [
        ("dataset", DATASETS, "meta/info.json"),
        ("cache", CACHES, CACHE_MARKER),
        ("run", RUNS, RUN_MARKER),
        ("export", EXPORTS, ONNX_MARKER),
        ("export", EXPORTS, POLICY_MARKER),
    ]
    found: dict[Path, Item] = {}
    for kind, folder, marker in markers:
        for path in sorted((root / folder).glob(f"*/{marker}")):
            home = (root / folder) / path.relative_to(root / folder).parts[0]
            found.setdefault(home, Item(kind=kind, path=home, bytes=folder_size(home), modified=path.stat().st_mtime))
    return sorted(found.values(), key=lambda item: -item.modified)


def newest(kind: str) -> Path:
    """The newest item of that kind.

    Raises:
        CacheError, RunError: there is none; says how to make one.
    """
    for item in items():
        if item.kind == kind:
            return item.path
    if kind == "cache":
        raise CacheError(
            "there is no cache in caches/", "make one with `imagewam cache --editor tiny`, or pass --cache DIR"
        )
    raise RunError("there is no run in runs/", "train one with `imagewam train-expert`, or pass --run DIR")


def folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

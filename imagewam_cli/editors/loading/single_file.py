"""Say what a path is that is no pipeline folder: a file of weights, one component, or a folder of single files."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from imagewam_cli.editors.loading.foreign_weights import kind_of_names
from imagewam_cli.editors.loading.weight_files import kind_of_file, read_header
from imagewam_cli.errors import EditorError

_SINGLE = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")


def describe_single(path: Path) -> str:
    """Say what a file is, judged by its first bytes and the names of its tensors."""
    with path.open("rb") as file:
        start = file.read(512)
    if (other := kind_of_file(start)) is not None:
        return other
    try:
        names = read_header(path)
    except EditorError:
        return "is a single file"
    meaning = kind_of_names(names)
    return f"is a single file of {len(names)} tensors" + (f"; {meaning}" if meaning else "")


def describe_folder(folder: Path, parts: Collection[str]) -> str | None:
    """Say what a folder is that has none of the components `parts`; None if nothing is known about it."""
    if any((folder / part).is_dir() for part in parts):
        return None
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_bytes())
            name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        except (ValueError, AttributeError, TypeError):
            name = None
        return f"is one component{f' ({name})' if name else ''}, not a whole pipeline"
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SINGLE and p.is_file())
    return f"has {files[0].name}, which {describe_single(files[0])}" if files else None

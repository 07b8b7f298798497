"""An export is there whole or not at all: it grows in a hidden folder beside its place and is renamed when done."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from imagewam_cli.errors import UsageError
from imagewam_cli.files import sync_folder


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder to write into; it becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        UsageError: `out` is a file or a folder that is not empty.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} already holds something", "choose an empty or a new folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name  # not the scratch folder itself: that one is closed to other users
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    sync_folder(out.parent)


def sizes(folder: Path) -> Mapping[str, int]:
    """file name, with its sub-folder where it has one -> bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

"""Write files and folders atomically, and compute checksums of files.

Everything is first written under a temporary name in the same folder, then flushed to disk, then renamed. After a kill,
a full disk or a power cut, the file has its previous content or the new one, never a mixture. Temporary names contain
`.partial`; readers ignore what a killed process leaves under them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from imagewam_cli.errors import UsageError

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""


def expanded(path: Path | str) -> Path:
    """Expand a leading `~`, which a shell leaves alone in `--out=~/here`; leave a name that belongs to no user."""
    return Path(os.path.expanduser(path))  # unlike `Path.expanduser`, never raises for an unknown user


def local_name(path: Path) -> str:
    """Return the path for a library that also takes URLs.

    It is absolute, because such a library takes the start of a relative path like `a:b/c.mp4` for a protocol.
    """
    return str(path.absolute())


def nearest_existing(path: Path) -> Path:
    """Return the absolute path, or the nearest of its parents that exists; a broken link exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())


def user_cache_folder() -> Path | None:
    """Return imagewam's folder in the user's cache folder; None without a home folder that can be written."""
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "imagewam"  # without a home, the ~ stays
    usable = folder.is_absolute() and os.access(nearest_existing(folder), os.W_OK | os.X_OK)
    return folder if usable else None


def partial_of(path: Path) -> Path:
    """Return the temporary name of a file that only one process writes at a time.

    The name is fixed, so that the next attempt overwrites what a killed process left.
    """
    return path.with_name(path.name + PARTIAL)


def unique_partial(path: Path) -> Path:
    """Return a temporary name of a file that several processes may write at the same time."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file's content with `data`; its folder must exist."""
    temporary = partial_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, *, partial: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path for a library to write to; rename it to `path` when the block ends.

    Missing parent folders are created. If the block raises, `path` is unchanged and the temporary file is deleted.

    Args:
        path: the file to create or replace.
        partial: the temporary path, in the same folder. By default it is hidden and unique, and has the suffix of
            `path`, from which many libraries choose the format.
        durable: flush the file to disk before it is renamed. Files that can be downloaded again do not need this.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial or path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{PARTIAL}{path.suffix}")
    try:
        yield temporary
        if durable:
            sync_file(temporary)
            move_into_place(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, partial: Path | None = None) -> Iterator[Path]:
    """Yield a new folder to write into; flush all its files and rename it to `path` when the block ends.

    Missing parent folders are created. If the block raises, `path` is unchanged and the temporary folder is deleted.

    Args:
        path: the folder to create.
        replace: delete a folder that is already at `path` just before the new one takes its name. Otherwise only a
            missing or an empty folder is replaced.
        partial: the temporary folder, next to `path`; what a killed process left there is deleted first. By default it
            is hidden and unique.

    Raises:
        UsageError: `replace` is False, and `path` is a file or a folder that is not empty.
    """
    path = path.resolve()  # "." and ".." have no name to derive the temporary one from
    if not replace:
        require_vacant(path)
    temporary = partial or path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)  # not with `tempfile`, which creates folders that only their owner can open
    try:
        yield temporary
        _sync_tree(temporary)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        else:
            require_vacant(path)
        move_into_place(temporary, path)  # rename() replaces an empty folder and fails for any other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_vacant(folder: Path) -> None:
    """Check that a new folder can take this name.

    Raises:
        UsageError: it is a file, or a folder that is not empty.
    """
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UsageError(f"{folder} exists and is not empty", "choose a new or an empty folder")
    elif folder.exists():
        raise UsageError(f"{folder} is a file", "choose a new or an empty folder")


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, and make the rename durable."""
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush the file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the folder's directory entries to disk, so that renames and deletions in it survive a power cut."""
    sync_file(folder)


def _sync_tree(folder: Path) -> None:
    """Flush every file below the folder, and the folders themselves."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync_file(path)
    sync_folder(folder)


def file_sizes(folder: Path) -> Mapping[str, int]:
    """Return the size in bytes of every file below `folder`, by its relative path with forward slashes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def checksum_of(data: bytes | memoryview) -> str:
    """Return the XXH3-128 of `data` in hexadecimal: fast, against accidental damage only."""
    return xxhash.xxh3_128_hexdigest(data)


def has_checksum(path: Path, checksum: str) -> bool:
    """Return whether the file exists and has this XXH3-128."""
    return path.is_file() and checksum_of(path.read_bytes()) == checksum


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal: slower, and safe against deliberate collisions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

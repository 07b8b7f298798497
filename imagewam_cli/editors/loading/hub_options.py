"""Options of a download, and the checks of its folder, its token and the free disk space."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.files import nearest_existing

_MARGIN = 1.05
"""Required free space, relative to the size of the files."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Options of a download, with the names of `hf download`."""

    revision: str | None = None
    include: tuple[str, ...] = ()
    """Patterns instead of the plugin's own choice."""
    exclude: tuple[str, ...] = ()
    local_dir: Path | None = None
    cache_dir: Path | None = None
    token: str | None = None
    max_workers: int = 8
    endpoint: str | None = None
    """Address of another Hub; by default `HF_ENDPOINT`, or huggingface.co."""


def require_folder(options: FetchOptions, *, writable: bool = False) -> None:
    """Check that the download goes into a folder, and if `writable` that files can be created in it.

    Raises:
        EditorError: it is a file, or cannot be written.
    """
    folder, name = destination(options)
    path = nearest_existing(folder)
    hint = "choose another folder with --cache-dir or --local-dir"
    if name.isupper():
        hint = f"set {name} to another folder, or choose one with --cache-dir or --local-dir"
    if not path.is_dir():
        raise EditorError(f"{path} is not a folder, but {name} needs one", hint)
    if writable and not os.access(path, os.W_OK | os.X_OK):
        raise EditorError(f"{path} cannot be written ({name})", f"change its permissions, or {hint}")


def require_room(options: FetchOptions, repo: str, missing_bytes: int) -> None:
    """Check that the disk has room for the files that are missing.

    Raises:
        EditorError: it has not.
    """
    folder = nearest_existing(destination(options)[0])
    free = shutil.disk_usage(folder).free
    if missing_bytes * _MARGIN > free:
        raise EditorError(
            f"{repo} needs {missing_bytes / 1e9:.1f} GB more, but {folder} has {free / 1e9:.1f} GB free",
            "free some space, or choose another disk with --cache-dir or --local-dir",
        )


def sound_token(token: str | None) -> str | None:
    """Return the token without white space around it; None for none.

    Raises:
        UsageError: the token, or that of the environment, has characters that no token has.
        EditorError: the stored token cannot be read.
    """
    from huggingface_hub import get_token

    given = token is not None
    try:
        found = token if given else get_token()
    except OSError as error:
        raise EditorError(
            f"the token in {error.filename} cannot be read: {(error.strerror or str(error)).lower()}",
            "set HF_HOME to a folder, or pass --token",
        ) from error
    clean = (found or "").strip()
    if not clean.isascii() or not (clean.isprintable() and " " not in clean):
        where = "--token" if given else "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored token"
        raise UsageError(
            f"{where} is not a token: it has white space or characters that no token has",
            "copy the token again from https://huggingface.co/settings/tokens",
        )
    return clean or None if given else None


def destination(options: FetchOptions) -> tuple[Path, str]:
    """Return the folder of the download, and the option or environment variable that names it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if options.local_dir is not None:
        return options.local_dir.absolute(), "--local-dir"
    if options.cache_dir is not None:
        return options.cache_dir.absolute(), "--cache-dir"
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    return Path(HF_HUB_CACHE).absolute(), next((n for n in names if os.environ.get(n)), "the Hub's cache")

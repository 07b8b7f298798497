"""Where a cache lies, as a user writes it: a folder, or a URL of a store that fsspec reaches."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagewam_cli.errors import UsageError

Location = Path | str
"""A folder; or, as text, the URL of a remote store without a slash at its end."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def location(text: str) -> Location:
    """A URL as such, all else as the folder of that path, with `~` for a home. A `file://` URL is the folder it names.

    Raises:
        UsageError: a URL of nothing.
    """
    found = _URL.match(text)
    if found is None:
        return expanded(text)
    if not text[found.end() :].strip("/"):
        raise UsageError(f"{text} names no place", "as s3://BUCKET/caches/NAME")
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text.rstrip("/")


def expanded(path: Path | str) -> Path:
    """With the home folder for a leading `~`: a shell leaves it in `--out=~/here`."""
    return Path(os.path.expanduser(path))  # unlike the method, it leaves `~nobody` as it is


def name_of(address: Location) -> str:
    """The last part, for a run that is named after it."""
    return address.rpartition("/")[2] if isinstance(address, str) else address.resolve().name

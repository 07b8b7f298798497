"""Parse where a cache is stored: a folder, or a URL that fsspec supports."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagewam_cli.errors import UsageError
from imagewam_cli.files import expanded

Location = Path | str
"""Path of a folder, or URL of a remote store without a trailing slash."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def location(text: str) -> Location:
    """Parse text into a URL or the path of a folder. `~` and `file://` URLs become paths.

    Raises:
        UsageError: a URL without a bucket or folder.
    """
    found = _URL.match(text)
    if found is None:
        return expanded(text)
    if not text[found.end() :].strip("/"):
        raise UsageError(f"{text} has no bucket or folder", "write it as s3://BUCKET/caches/NAME")
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text.rstrip("/")


def name_of(address: Location) -> str:
    """Return the last component of the path or URL, the default name of a run."""
    return address.rpartition("/")[2] if isinstance(address, str) else address.resolve().name

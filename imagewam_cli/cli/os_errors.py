"""What the operating system refuses, as one line and what to do next; and a look at a folder before hours of work are
done for it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_TOLD = (*_FULL, *_FORBIDDEN, errno.EFBIG, errno.EROFS)
_ELSEWHERE = "choose another place (--out)"
_RUST = re.compile(r"\(os error (\d+)\)")


def os_error_of(error: BaseException) -> OSError | None:
    """The system's error that this is; libraries in Rust tell it in their text alone. None: another error."""
    if isinstance(error, OSError):
        return error
    found = _RUST.search(str(error))
    number = 0 if found is None else int(found[1])
    return OSError(number, os.strerror(number)) if number in _TOLD else None


def explained(error: OSError) -> tuple[str, str | None]:
    """The line and the hint; None where there is no advice to give."""
    place = str(error.filename2 or error.filename or "")
    if error.errno in _FULL:
        return "the disk is full", "free some space; the same command then goes on from here"
    if error.errno == errno.EFBIG:
        return "the disk, or this user's limit, does not allow so large a file", f"raise the limit, or {_ELSEWHERE}"
    if error.errno in _FORBIDDEN:
        return f"Permission denied: {place}".rstrip(": "), f"{_ELSEWHERE}, or change who may use this one"
    if error.errno == errno.EROFS:
        return f"the disk can only be read: {place}".rstrip(": "), _ELSEWHERE
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a file is in the way of a folder: {place}".rstrip(": "), _ELSEWHERE
    if error.errno == errno.EISDIR:
        return f"a folder is in the way of a file: {place}".rstrip(": "), f"move it away, or {_ELSEWHERE}"
    return f"{error.strerror or error}: {place}".rstrip(": "), None


def require_writable(folder: Path) -> None:
    """The folder, or the nearest one above it that there is, must take files.

    Raises:
        OSError: it does not; for `explained`.
    """
    path = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not path.is_dir():
        raise _refused(errno.ENOTDIR, path)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise _refused(errno.EROFS, path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _refused(errno.EACCES, path)


def _refused(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))

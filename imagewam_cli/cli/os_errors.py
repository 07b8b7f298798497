"""Explain errors of the operating system in one line with a hint, and check early that a folder is writable."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from imagewam_cli.files import nearest_existing

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_EXPLAINED = (*_FULL, *_FORBIDDEN, errno.EFBIG, errno.EROFS)
_ELSEWHERE = "write to another path; --out sets it"
_RUST = re.compile(r"\(os error (\d+)\)")


def os_error_of(error: BaseException) -> OSError | None:
    """Return the error as an OSError; None if the operating system did not cause it.

    Rust libraries give the error number only in their message.
    """
    if isinstance(error, OSError):
        return error
    found = _RUST.search(str(error))
    number = 0 if found is None else int(found[1])
    return OSError(number, os.strerror(number)) if number in _EXPLAINED else None


def message_and_hint(error: OSError) -> tuple[str, str | None]:
    """Return the message for the user and a hint; the hint is None if no advice applies."""
    path = str(error.filename2 or error.filename or "")
    if error.errno in _FULL:
        return "the disk is full", "free some space, then run the same command again"
    if error.errno == errno.EFBIG:
        return "the file is too large for the disk or for the limits of this user", f"raise the limit, or {_ELSEWHERE}"
    if error.errno in _FORBIDDEN:
        return f"Permission denied: {path}".rstrip(": "), f"change its permissions, or {_ELSEWHERE}"
    if error.errno == errno.EROFS:
        return f"the disk is read-only: {path}".rstrip(": "), _ELSEWHERE
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a file exists where a folder is needed: {path}".rstrip(": "), _ELSEWHERE
    if error.errno == errno.EISDIR:
        return f"a folder exists where a file is needed: {path}".rstrip(": "), f"move it away, or {_ELSEWHERE}"
    return f"{error.strerror or error}: {path}".rstrip(": "), None


def require_writable(folder: Path) -> None:
    """Check that files can be created in a folder, or in its nearest parent that exists.

    Raises:
        OSError: files cannot be created there; `message_and_hint` explains the error.
    """
    path = nearest_existing(folder)
    if not path.is_dir():
        raise _refused(errno.ENOTDIR, path)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise _refused(errno.EROFS, path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _refused(errno.EACCES, path)


def _refused(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))

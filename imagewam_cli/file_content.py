"""Recognize files whose content is not what their name says: pointers, error pages, archives, empty files.

Downloads and clones leave such files where weights, videos or tables should be. A reader that fails to parse a file
asks `content_fault` why before it blames the recording or the copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HEAD_BYTES = 1024
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_COPY_AGAIN = "copy or download it again"

_ARCHIVES = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
)
_PARQUET = b"PAR1"


@dataclass(frozen=True, kw_only=True)
class ContentFault:
    """What a file holds instead of its content."""

    problem: str
    """Continues a sentence that begins with the file's path, such as "is empty"."""
    hint: str


def content_fault(path: Path) -> ContentFault | None:
    """Return what is wrong with a file that could not be parsed, or None if its first bytes do not tell.

    Only the first and last bytes are read. A missing or unreadable file gives None.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            size = file.seek(0, 2)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except OSError:
        return None
    return _of_head(path, head, size) or _unfinished(path, head, tail)


def _of_head(path: Path, head: bytes, size: int) -> ContentFault | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return ContentFault(problem="is empty", hint=_COPY_AGAIN)
    if head.startswith(_LFS_POINTER):
        return ContentFault(
            problem="is a Git LFS pointer, not the file itself",
            hint=f"run `git lfs pull` in the folder that was cloned ({path.parent})",
        )
    if size < _HEAD_BYTES and b"/annex/objects/" in head:
        return ContentFault(
            problem="is a git-annex pointer, not the file itself", hint=f"run `git annex get .` in {path.parent}"
        )
    if text.startswith((b"<!doctype html", b"<html")):
        return ContentFault(
            problem="is a web page, saved under the name of the file",
            hint="download the file again; a private or gated one needs a login (`hf auth login`)",
        )
    if text.startswith(b"<?xml") and b"<error>" in text:
        return ContentFault(problem="is a server's error message, saved under the name of the file", hint=_COPY_AGAIN)
    for magic, name in _ARCHIVES:
        if head.startswith(magic):
            return ContentFault(problem=f"is compressed ({name})", hint=f"unpack it first; it is a {name} file")
    if not any(head):
        return ContentFault(problem=f"begins with {len(head)} zero bytes", hint=f"the copy failed; {_COPY_AGAIN}")
    if path.suffix not in (".json", ".jsonl") and size < _HEAD_BYTES and _is_text(head):
        line = " ".join(head.decode("utf-8").split())
        return ContentFault(problem=f"holds only the text {line[:60]!r}", hint=_COPY_AGAIN)
    return None


def _unfinished(path: Path, head: bytes, tail: bytes) -> ContentFault | None:
    if head.startswith(_PARQUET) and tail != _PARQUET:
        return ContentFault(
            problem="is a parquet file without its end",
            hint="the recording was never finished, or the copy failed; copy or download it again",
        )
    if path.suffix == ".mp4" and head[4:8] == b"ftyp" and not _has_mp4_index(path):
        return ContentFault(
            problem="is an mp4 without its index (moov)",
            hint="the recording was never finished, or the copy failed; copy or download it again",
        )
    return None


def _has_mp4_index(path: Path) -> bool:
    """Return whether one of the boxes of an mp4 is a whole `moov`, by walking from box to box."""
    whole, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while len(header := file.read(16)) >= 8:
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if size == 1:  # the size follows in 64 bits
                size = int.from_bytes(header[8:], "big")
            if size < 8:
                return False
            position += size
            if kind == b"moov":
                return position <= whole
            file.seek(position)
    return False


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8").replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    except UnicodeDecodeError:
        return False

"""Read JSON and JSON-lines files as people have them: with byte-order marks, in UTF-16, with Windows line ends.

Repeated keys with different values are refused, because a parser would silently keep the last.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagewam_cli.errors import DatasetError
from imagewam_cli.file_content import content_fault

DAMAGED = "copy or download the dataset again"

_BYTE_ORDER_MARKS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        DatasetError: it is not JSON, or repeats a key with different values; the message names the line or the key.
    """
    return _parse(path, _read_text(path), f"{path}")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each line of a JSON-lines file that is not blank.

    Raises:
        DatasetError: the file is missing, or a line is not JSON; the message names the line.
    """
    try:
        text = _read_text(path)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing", DAMAGED) from error
    # Only newlines end a line. `str.splitlines` would also split at separators such as U+2028 inside a sentence.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(path, line, f"{path}, line {number}")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except IsADirectoryError as error:
        raise DatasetError(f"{path} is a folder, not a file", DAMAGED) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}", "check the permissions and the disk") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        fault = content_fault(path)
        if fault is not None:
            raise DatasetError(f"{path} {fault.problem}", fault.hint) from error
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path}, line {line}: byte {error.start} is not {encoding} text", "save the file as UTF-8"
        ) from error


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except json.JSONDecodeError as error:
        fault = content_fault(path)
        if fault is not None:
            raise DatasetError(f"{path} {fault.problem}", fault.hint) from error
        raise DatasetError(f"{where}: not valid JSON: {error}", f"repair it by hand, or {DAMAGED}") from error
    except RecursionError as error:
        raise DatasetError(f"{where}: not valid JSON: nested too deeply", DAMAGED) from error
    except _RepeatedKeyError as error:
        raise DatasetError(f"{where}: {error}", "keep one of the two values") from error


class _RepeatedKeyError(ValueError):
    """An object has one key twice, with different values."""


def _without_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise _RepeatedKeyError(f"the key {key!r} is given twice, with different values")
        found[key] = value
    return found

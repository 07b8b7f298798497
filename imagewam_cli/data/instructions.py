"""Check that the instructions of a dataset are sentences that an editor can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from imagewam_cli.errors import DatasetError, warn

_MISSING = frozenset({"none", "null", "nan", "n/a", "na", "unknown", "default", "task", "todo", "test"})
"""Words that stand for a missing instruction, in lower case."""
_IDENTIFIER = re.compile(r"[!-~]*([a-z0-9][A-Z]|[_/:=\\-]|\.[!-~]|[0-9])[!-~]*")
"""ASCII without spaces, with an inner capital, a digit or a separator. Languages without spaces are not ASCII."""
_SHOWN = 3
"""Number of instructions that a warning quotes."""


def require_instruction(value: object, where: str) -> str:
    """Return an instruction as a dataset stores it, if it is text. where: file, episode and frame, for the error.

    Raises:
        DatasetError: the value is missing, empty, or not text.
    """
    if isinstance(value, str) and value.strip():
        return value
    problem = "is empty" if isinstance(value, str) else "is missing" if value is None else f"is {value!r}, not text"
    raise DatasetError(
        f"{where}: the instruction {problem}",
        "name the feature that holds the sentence with --instruction-key (`imagewam info` lists the features), "
        "or write the sentence into the dataset's tasks",
    )


def warn_of_identifiers(instructions: Iterable[str], where: object) -> None:
    """Warn of instructions that look like a name or a missing value instead of a sentence. where: the dataset."""
    odd = [text for text in instructions if is_identifier(text)]
    if odd:
        shown = ", ".join(repr(text) for text in odd[:_SHOWN]) + (", ..." if len(odd) > _SHOWN else "")
        count = "1 instruction looks" if len(odd) == 1 else f"{len(odd)} instructions look"
        warn(
            f"{where}: {count} like a name, not like a sentence: {shown}; "
            "if another feature holds the sentence, pass it with --instruction-key"
        )


def is_identifier(text: str) -> bool:
    """Return whether a text looks like a name (`PickCube-v1`, `pick_cube`) or like a missing value (`None`)."""
    word = text.strip()
    return word.lower() in _MISSING or _IDENTIFIER.fullmatch(word) is not None

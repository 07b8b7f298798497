"""All errors that imagewam raises on purpose, and its warnings.

Every error that a user can cause has a `hint` that says what to do next. The command line prints `error: <message>` and
`hint: <hint>`, and exits with the class's `exit_code`: 2 for wrong usage, 1 for a failure. Any other exception is a
bug; `cli.app` reports it as one.
"""

from __future__ import annotations

import copyreg
import difflib
import warnings
from collections.abc import Iterable
from typing import Any


class ImagewamError(Exception):
    """A failure, described in one line, with a hint that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all attributes, whatever arguments the class takes: workers send errors to the main process."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(ImagewamError):
    """A wrong command or call, found before any work was done."""

    exit_code = 2


class ConfigError(UsageError):
    """A wrong configuration key or value; the message names the file and the key."""


class UnknownNameError(UsageError):
    """An unknown name; the hint suggests the nearest valid one."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        choices = sorted(valid)
        super().__init__(f"unknown {kind} {name!r}", nearest(name, choices))
        self.kind, self.name, self.choices = kind, name, choices


class PluginError(ImagewamError):
    """A plugin could not be loaded, or two plugins claim one name."""


class DatasetError(ImagewamError):
    """A dataset is damaged or lacks a requested part; the message names the file and the episode."""


class EditorError(ImagewamError):
    """The weights of an editor are missing or have the wrong shape."""


class CaptureError(ImagewamError):
    """The recorded keys and values do not have the shapes that the editor's spec declares."""


class CacheError(ImagewamError):
    """A cache is missing, damaged, or belongs to a different editor, dataset or version."""


class RunError(ImagewamError):
    """A training run or policy is missing, damaged, or does not match its editor, recipe or data."""


class NonFiniteLossError(ImagewamError):
    """The loss is NaN or infinite; the message names the rows of the batch."""


class ExportError(ImagewamError):
    """The format cannot represent the policy, or the exported policy acts differently."""


class SimulationError(ImagewamError):
    """An environment rejected an action or a reset."""


class ImagewamWarning(UserWarning):
    """Something that does not stop a command, but may not be what the user wants.

    The command line prints it once as `warning: <message>`; `python -W error` makes it an error.
    """


def warn(message: str) -> None:
    """Warn the user: one line that says what was found, where, and what to do about it."""
    warnings.warn(ImagewamWarning(message), stacklevel=3)


def install_hint(extra: str) -> str:
    """Return the command that installs an optional group of packages, quoted for every shell."""
    return f"pip install 'imagewam[{extra}]'"


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the closest valid name, or all names if none or several are equally close."""
    valid = sorted(choices)
    likeness = {choice: _likeness(name, choice) for choice in valid}
    best = max(likeness.values(), default=0.0)
    closest = [choice for choice in valid if likeness[choice] == best]
    if best >= _ALIKE and len(closest) == 1:
        return f"did you mean {closest[0]!r}?"
    return "choose one of: " + ", ".join(valid) if valid else "none is installed; see `imagewam plugins`"


_ALIKE = 0.65
"""Likeness from which a name counts as a mistyped one: two wrong letters in six, or one in three."""


def _likeness(one: str, other: str) -> float:
    """Return how alike two names are, from 0 to 1. An equal beginning such as "observation." proves nothing."""
    whole = difflib.SequenceMatcher(a=other.casefold(), b=one.casefold()).ratio()
    ours, theirs = one.casefold().split("."), other.casefold().split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[0] == theirs[0]:
        ours, theirs = ours[1:], theirs[1:]
    return min(whole, difflib.SequenceMatcher(a=".".join(theirs), b=".".join(ours)).ratio())

"""The one error tree of imagewam.

Every error that a user can cause carries a `hint`: what to do next. The command line prints `error: <message>` and
`hint: <hint>` and exits with the class's `exit_code` (2 for wrong usage, 1 for a failure). Anything that is not an
`ImagewamError` is a bug and reaches the boundary in `cli.app`.
"""

from __future__ import annotations

import copyreg
import difflib
from collections.abc import Iterable
from typing import Any


class ImagewamError(Exception):
    """A failure with one clear line for the reader and a hint that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it is, whatever arguments its class takes: workers send errors to the process that tells them."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(ImagewamError):
    """The command or call was wrong: nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value or key is wrong; the message names the file and the key."""


class UnknownNameError(UsageError):
    """A name is not registered; the nearest valid one is suggested."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        choices = sorted(valid)
        super().__init__(f"unknown {kind} {name!r}", nearest(name, choices))
        self.kind, self.name, self.choices = kind, name, choices


class PluginError(ImagewamError):
    """A plugin could not be loaded, or two plugins claim one name."""


class DatasetError(ImagewamError):
    """A dataset is broken or lacks what was asked of it; the message names the file and the episode."""


class EditorError(ImagewamError):
    """An editor's weights are missing or do not fit."""


class CaptureError(ImagewamError):
    """Keys and values could not be recorded as the editor's layout promises."""


class CacheError(ImagewamError):
    """A cache is missing, damaged, or belongs to another editor, dataset or version."""


class RunError(ImagewamError):
    """A training run or policy folder is missing, damaged or does not match."""


class NonFiniteLossError(ImagewamError):
    """The loss became NaN or infinite; the message names the rows of the batch."""


class ExportError(ImagewamError):
    """An export failed its own check or cannot express the policy."""


class SimulationError(ImagewamError):
    """An environment refused an action or a reset."""


def install_hint(extra: str) -> str:
    """Return the command that installs an optional group of packages, quoted for every shell."""
    return f"pip install 'imagewam[{extra}]'"


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest valid one, or the list of all where none or several are closest."""
    valid = sorted(choices)
    close = difflib.get_close_matches(name, valid, n=2, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(a=found, b=name).ratio() for found in close]
    if close and likeness.count(likeness[0]) == 1:
        return f"did you mean {close[0]!r}?"
    return "choose one of: " + ", ".join(valid) if valid else "none is installed; see `imagewam plugins`"

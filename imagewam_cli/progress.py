"""Progress on stderr: a bar on a terminal, and a plain line now and then anywhere else, such as in the log of a job."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, cast

EVERY = 30.0
"""Seconds between two lines."""
_SHORT = 0.5
"""Work that takes fewer seconds shows nothing."""


class Progress(Protocol):
    """The part of a tqdm bar that is used."""

    n: int

    def update(self, n: int = 1) -> None:
        """Advance by n units."""

    def set_postfix(self, ordered_dict: Mapping[str, object], refresh: bool = True) -> None:
        """Show values after the bar."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Show text after the bar."""


class ProgressLines:
    """Progress as whole lines: at most one every `EVERY` seconds, and one at the end."""

    def __init__(self, total: int, unit: str, *, initial: int = 0) -> None:
        self.n = initial
        self._total, self._unit, self._initial = total, unit, initial
        self._more = ""
        self._began = self._printed = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Advance by n units."""
        self.n += n
        if time.monotonic() - self._printed >= EVERY:
            self._print()

    def set_postfix(self, ordered_dict: Mapping[str, object], refresh: bool = True) -> None:
        """Add values to the following lines."""
        self._more = "".join(f", {name} {value}" for name, value in ordered_dict.items())

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Add a text to the following lines."""
        self._more = f", {s}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.n > self._initial and time.monotonic() - self._began >= _SHORT:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(self.line(self._printed - self._began), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Return the line after so many seconds: "120 of 400 rows, 3.1 row/s, 1 min 30 s left"."""
        rate = (self.n - self._initial) / max(seconds, 1e-9)
        if self._unit == "B":
            done, pace = f"{bytes_text(self.n)} of {bytes_text(self._total)}", f"{bytes_text(rate)}/s"
        else:
            done = f"{self.n} of {self._total} {self._unit}{'' if self._total == 1 else 's'}"
            pace = f"{rate:.3g} {self._unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.3g} s/{self._unit}"
        left = self._total - self.n
        end = f"{seconds_text(left / rate)} left" if left > 0 and rate > 0 else f"{seconds_text(seconds)} in total"
        return f"{done}, {pace}, {end}{self._more}"


def progress(total: int, unit: str, *, initial: int = 0, shown: bool = True) -> AbstractContextManager[Progress]:
    """Return the progress of `total` units on stderr."""
    if shown and not is_terminal():
        return ProgressLines(total, unit, initial=initial)
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        disable=not shown,
        file=sys.stderr,
        dynamic_ncols=True,
        delay=_SHORT,  # an early error is printed without a progress bar above it
    )
    return cast("AbstractContextManager[Progress]", bar)


def write_line(line: str) -> None:
    """Print a line on stderr, above a progress bar if one is drawn."""
    if "tqdm" in sys.modules and is_terminal():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bytes_text(size: float) -> str:
    """Return a size such as "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """Return a duration such as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

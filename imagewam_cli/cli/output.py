"""Print results on stdout, as text or JSON, and messages and progress on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, cast

from imagewam_cli.errors import ImagewamWarning

Format = Literal["human", "json"]


class Progress(Protocol):
    """The part of a tqdm bar that commands use."""

    n: int

    def update(self, n: int = 1) -> None:
        """Advance by n units."""

    def set_postfix(self, ordered_dict: Mapping[str, object], refresh: bool = True) -> None:
        """Show values after the bar."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Show text after the bar."""


class Output:
    """The output of a process. `--quiet` and `--debug` set its switches."""

    quiet = False
    debug = False

    def say(self, line: str) -> None:
        """Print a progress message on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def showing_warnings(self) -> Iterator[None]:
        """Print every `ImagewamWarning` on stderr, each text once, even under --quiet: it may concern a robot."""
        shown: set[str] = set()
        with warnings.catch_warnings():
            show_others = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *details: Any, **more: Any) -> None:
                if not issubclass(category, ImagewamWarning):
                    show_others(message, category, *details, **more)
                elif str(message) not in shown:
                    shown.add(str(message))
                    print(f"warning: {message}", file=sys.stderr, flush=True)

            warnings.simplefilter("always", ImagewamWarning)
            warnings.showwarning = show
            yield

    def result(self, values: Any, text: str, format: Format = "human") -> None:
        """Print the result of the command on stdout: `text`, or `values` as JSON."""
        print(json.dumps(values, indent=2) if format == "json" else text, flush=True)

    def progress(self, total: int, unit: str, *, initial: int = 0) -> AbstractContextManager[Progress]:
        """Return a progress bar on stderr, which shows nothing under --quiet."""
        from tqdm import tqdm

        bar = tqdm(
            total=total,
            unit=unit,
            initial=initial,
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            delay=0.5,  # an early error is printed without a progress bar above it
        )
        return cast("AbstractContextManager[Progress]", bar)


output = Output()


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

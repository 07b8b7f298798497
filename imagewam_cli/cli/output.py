"""Print results on stdout, as text or JSON, and messages and progress on stderr."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from imagewam_cli.errors import ImagewamWarning
from imagewam_cli.progress import Progress, bytes_text, progress, seconds_text, write_line

__all__ = ["Format", "Output", "Progress", "bytes_text", "output", "seconds_text"]

Format = Literal["human", "json"]


class Output:
    """The output of a process. `--quiet` and `--debug` set its switches."""

    quiet = False
    debug = False

    def accept_any_text(self) -> None:
        """Let stdout and stderr print what their encoding lacks as \\u escapes, instead of failing.

        Names and instructions may be in any language, whatever the locale is.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def say(self, line: str) -> None:
        """Print a progress message on stderr."""
        if not self.quiet:
            write_line(line)

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
                    write_line(f"warning: {message}")

            warnings.simplefilter("always", ImagewamWarning)
            warnings.showwarning = show
            yield

    def result(self, values: Any, text: str, format: Format = "human") -> None:
        """Print the result of the command on stdout: `text`, or `values` as JSON."""
        print(json.dumps(values, indent=2) if format == "json" else text, flush=True)

    def progress(self, total: int, unit: str, *, initial: int = 0) -> AbstractContextManager[Progress]:
        """Return the progress of `total` units on stderr, which shows nothing under --quiet."""
        return progress(total, unit, initial=initial, shown=not self.quiet)


output = Output()

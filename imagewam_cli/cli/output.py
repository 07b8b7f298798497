"""What a command prints: results on stdout (text or JSON), talk and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

Format = Literal["human", "json"]


class Output:
    """One per process; `--quiet` and `--debug` set its switches."""

    quiet = False
    debug = False

    def say(self, line: str) -> None:
        """Talk: what is being done, on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def result(self, values: Any, text: str, format: Format = "human") -> None:
        """The command's result on stdout: `text` for people, `values` as JSON."""
        print(json.dumps(values, indent=2) if format == "json" else text, flush=True)

    def progress(self, total: int, unit: str, *, initial: int = 0) -> Any:
        """A tqdm bar on stderr; silent when quiet."""
        from tqdm import tqdm

        return tqdm(
            total=total,
            unit=unit,
            initial=initial,
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            delay=0.5,  # a command that is refused at once shows its message alone
        )


output = Output()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by two spaces."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)


def bytes_text(size: float) -> str:
    """12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

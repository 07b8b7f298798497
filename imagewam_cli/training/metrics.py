"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and TensorBoard event files where that is installed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from imagewam_cli.files import write_atomically


class MetricLog:
    """Append-only. Lines of steps that a continued run does again are dropped first, so that each step stands once."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = self.path.open("a")
        self._board: Any = None
        with contextlib.suppress(ImportError):  # the extra `tensorboard` is optional
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=first_step)

    def add(self, step: int, **values: float) -> None:
        """One record, handed to the operating system before this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line that a kill cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records

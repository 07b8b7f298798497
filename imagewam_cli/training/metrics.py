"""Log the metrics of a run: `metrics.jsonl`, one JSON object per line, and TensorBoard event files if installed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from imagewam_cli.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricLog:
    """Appends records to the log of a run. Use it in `with`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the log. Records after `first_step` are deleted, because a resumed run writes them again."""
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        with contextlib.suppress(ImportError):  # the extra `tensorboard` is optional
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=first_step)

    def add(self, step: int, **values: float) -> None:
        """Write a record and flush it, so that it survives a kill of the process."""
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the records of the file; empty if it does not exist. A line cut off by a kill is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records

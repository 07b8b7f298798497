"""Size of the dataset that most training tests use, and functions that read the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagewam_cli.training.metrics import read_metrics

EPISODES, LENGTH = 6, 8
"""Number of episodes and frames per episode. With 1/5 held out, 40 rows are for training and 8 for validation."""


def log_of(run: Path) -> Path:
    return run / "metrics.jsonl"


def result_of(run: Path) -> dict[str, Any]:
    """Return everything that a run computed: files as bytes, metrics without their measured times."""
    found: dict[str, Any] = {
        str(path.relative_to(run)): path.read_bytes()
        for part in ("checkpoints", "policy")
        for path in (run / part).rglob("*")
        if path.is_file()
    }
    found["result"] = (run / "result.json").read_bytes()
    found["metrics"] = [
        {k: v for k, v in r.items() if not k.endswith("seconds_per_step")} for r in read_metrics(log_of(run))
    ]
    return found

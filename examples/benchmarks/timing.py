"""Time calls in interleaved rounds: each round runs every call once, so a busy machine slows all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return median seconds of each call over `repetitions` rounds, after one warm-up round.

    On a GPU, a call ends when its kernels have finished.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repetitions + 1):
        for name, call in calls.items():
            _finish()
            started = time.perf_counter()
            call()
            _finish()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def table(title: str, seconds: Mapping[str, float], base: str) -> str:
    """Return a Markdown table of medians and their ratios to `base`."""
    lines = [f"| {title} | median ms | / {base} |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * s:.1f} | {s / seconds[base]:.3f} |" for name, s in seconds.items()]
    return "\n".join(lines)


def machine() -> str:
    """Return a line that describes the machine."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"torch {torch.__version__}, {where}"


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Compare different numbers of (noise, time) draws per prefix at equal training time.

    python examples/benchmarks/draws.py --seconds 60 --plot draws.png

Trains once per number of draws from the same cache, with as many steps as fit into --seconds. The run that has
used the least time takes the next step, so that a busy machine slows all runs equally. Prints and plots the loss on
held-out episodes against the seconds of training; validation does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from online_or_cache import CACHE, POINTS, Run, demonstrations, loaded, trainer
from timing import machine

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.registry import Registry
from imagewam_cli.training.prefixes import CachedPrefixes

_TIMING_STEPS = 4
"""Number of steps that estimate the time of one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="a cache; by default one of 50 demonstrations is built")
    parser.add_argument("--editor", default="tiny")
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of the editor's own weights")
    parser.add_argument("--size", type=int, help="height and width of the editor's input; default: its own")
    parser.add_argument("--device", default="cpu", help="where the editor computes")
    parser.add_argument("--codec", default="bf16")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of training per number of draws")
    parser.add_argument("--precision", default="auto", help="precision of the expert: auto, float32 or bfloat16")
    parser.add_argument("--plot", type=Path, help="write a picture of the curves there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = measure(arguments, arguments.cache or built(arguments, Path(scratch)))
    if arguments.plot is not None:
        plot(runs, arguments.plot)
    if arguments.json:
        found = [
            {"draws": run.draws, "steps": len(run.seconds), "points": [asdict(point) for point in run.points]}
            for run in runs
        ]
        print(json.dumps({"machine": machine(), "runs": found}, indent=2))
        return
    print(f"{machine()}; batch {arguments.batch}\n\n{table(runs, arguments.seconds)}")


def measure(arguments: argparse.Namespace, cache: Path) -> list[Run]:
    source = CachedPrefixes(cache)
    runs = []
    for draws in arguments.draws:
        arguments.steps = _TIMING_STEPS
        tried = Run(kind=CACHE, draws=draws, trainer=trainer(source, arguments, draws))
        for _ in range(_TIMING_STEPS):
            tried.step()
        tried.close()
        # the learning-rate schedule needs the total number of steps
        arguments.steps = max(POINTS, round(arguments.seconds / statistics.median(tried.seconds[1:])))
        runs.append(Run(kind=CACHE, draws=draws, trainer=trainer(source, arguments, draws)))
    train(runs)
    return runs


def train(runs: Sequence[Run]) -> None:
    """Finish all runs; the run that has used the least time takes the next step."""
    while unfinished := [run for run in runs if len(run.seconds) < run.trainer.recipe.steps]:
        run = min(unfinished, key=lambda run: sum(run.seconds))
        run.step()
        if len(run.seconds) in {round(run.trainer.recipe.steps * (i + 1) / POINTS) for i in range(POINTS)}:
            run.validate()
    for run in runs:
        run.close()


def built(arguments: argparse.Namespace, scratch: Path) -> Path:
    dataset = open_dataset(demonstrations(scratch / "dataset"))
    codec = Registry.installed().codecs.load(arguments.codec)
    build_cache(dataset, loaded(arguments, dataset), scratch / "cache", codec, BuildSettings(stride=arguments.stride))
    return scratch / "cache"


def table(runs: Sequence[Run], seconds: float) -> str:
    """Return a Markdown table of validation loss at fractions of the time, with a column per number of draws."""
    header = " | ".join(f"{run.draws} draws" for run in runs)
    lines = [f"| planned s | {header} |", "|---" * (len(runs) + 1) + "|"]
    for i, points in enumerate(zip(*(run.points for run in runs), strict=True), start=1):
        cells = [f"{point.loss:.3f} (step {point.step}, {point.seconds:.1f} s)" for point in points]
        lines.append(f"| {seconds * i / POINTS:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot([p.seconds for p in run.points], [p.loss for p in run.points], marker="o", label=f"{run.draws} draws")
    axes.set(xlabel="seconds of training", ylabel="validation loss")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()

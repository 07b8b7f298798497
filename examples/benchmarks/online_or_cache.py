"""Find when a cache pays off: train from a cache and online, on one machine with the same rows, batch and seeds.

    python examples/benchmarks/online_or_cache.py --dataset datasets/tabletop --steps 200

For each number of draws, trains one run from a cache and one online. The runs take turns step by step, so that a busy
machine slows all equally. Prints two tables: rows per second of the median step, with the time to build the cache and
the number of epochs after which it pays off; and the loss on held-out episodes against the seconds of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from timing import machine

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.online import OnlinePrefixes
from imagewam_cli.training.prefixes import CachedPrefixes, PrefixSource
from imagewam_cli.training.recipe import FlowRecipe, TrainRecipe

CACHE, ONLINE = "cache", "online"
POINTS = 5
"""Number of validation losses per run."""


@dataclass(frozen=True, kw_only=True)
class Point:
    step: int
    seconds: float
    """Seconds of training, without building, decoding and validation."""
    loss: float
    """Loss of the averaged weights on held-out episodes."""


@dataclass(kw_only=True)
class Run:
    """One training run that makes one step per call."""

    kind: str
    draws: int
    trainer: Trainer
    seconds: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batches = self.trainer.data.batches(0, self.trainer.recipe.steps)

    def step(self) -> None:
        started = time.perf_counter()
        self.trainer.step(len(self.seconds), next(self._batches))
        self.seconds.append(time.perf_counter() - started)

    def validate(self) -> None:
        found = self.trainer.validate()
        if found is not None:
            self.points.append(Point(step=len(self.seconds), seconds=sum(self.seconds), loss=found.loss))

    @property
    def rows_per_second(self) -> float:
        """Rows per second of the median step, without the first."""
        rows = min(self.trainer.recipe.batch, len(self.trainer.data.train_rows))
        return rows / statistics.median(self.seconds[1:])

    def close(self) -> None:
        self._batches.close()  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Time to build the cache."""

    rows: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a LeRobot dataset; without it, 50 demonstrations are recorded")
    parser.add_argument("--editor", default="tiny")
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of the editor's own weights")
    parser.add_argument("--size", type=int, help="height and width of the editor's input; default: its own")
    parser.add_argument("--device", default="cpu", help="where the editor computes")
    parser.add_argument("--codec", default="bf16", help="codec of the cache")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="auto", help="precision of the expert: auto, float32 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    with tempfile.TemporaryDirectory() as scratch:
        build, runs = measure(arguments, Path(scratch))
    if arguments.json:
        print(json.dumps(values(build, runs), indent=2))
    else:
        print(f"{machine()}\n\n{speeds(build, runs)}\n\n{losses(runs)}")


def measure(arguments: argparse.Namespace, scratch: Path) -> tuple[Build, list[Run]]:
    dataset = open_dataset(arguments.dataset or demonstrations(scratch / "dataset"))
    editor = loaded(arguments, dataset)
    settings, codec = BuildSettings(stride=arguments.stride), Registry.installed().codecs.load(arguments.codec)
    started = time.perf_counter()
    manifest = build_cache(dataset, editor, scratch / "cache", codec, settings)
    build = Build(rows=manifest.rows, seconds=time.perf_counter() - started)
    direct = OnlinePrefixes(dataset, editor, stride=settings.stride)
    sources: dict[str, PrefixSource] = {CACHE: CachedPrefixes(scratch / "cache"), ONLINE: direct}
    with ExitStack() as stack:
        runs = [
            Run(kind=kind, draws=draws, trainer=trainer(source, arguments, draws))
            for draws in arguments.draws
            for kind, source in sources.items()
        ]
        needed = runs[0].trainer.data.rows_needed(0, arguments.steps)  # the order of rows is the same in all of them
        for source in sources.values():
            stack.enter_context(source.prepare(needed, scratch))
        for run in runs:
            stack.callback(run.close)
        train(runs, arguments.steps)
    return build, runs


def train(runs: Sequence[Run], steps: int) -> None:
    """Let the runs take turns, one step each."""
    validation_steps = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
    for step in range(1, steps + 1):
        for run in runs:
            run.step()
        if step in validation_steps:
            for run in runs:
                run.validate()


def demonstrations(folder: Path) -> Path:
    record(TabletopEnvironment(), folder, 50)
    return folder


def loaded(arguments: argparse.Namespace, dataset: Dataset) -> Editor:
    size = (arguments.size, arguments.size) if arguments.size else None
    return load_editor(
        arguments.editor,
        PrefixOptions(cameras=tuple(dataset.info.cameras), image_size=size),
        instructions=instructions_of(dataset),
        weights=arguments.weights,
        hardware=Hardware(device=arguments.device),
    )


def trainer(source: PrefixSource, arguments: argparse.Namespace, draws: int) -> Trainer:
    recipe = TrainRecipe(
        steps=arguments.steps, batch=arguments.batch, precision=arguments.precision, flow=FlowRecipe(draws=draws)
    )
    return Trainer(source, recipe)


def speeds(build: Build, runs: Sequence[Run]) -> str:
    """Return a Markdown table of rows per second, and the number of epochs after which the cache has paid off."""
    lines = ["| draws | cache, rows/s | online, rows/s | cache pays off after |", "|---|---|---|---|"]
    for cached, online in pairs(runs):
        after = won_back(build, cached.rows_per_second, online.rows_per_second)
        passes = "never" if after is None else f"{after:.1f} epochs"
        lines.append(f"| {cached.draws} | {cached.rows_per_second:.1f} | {online.rows_per_second:.1f} | {passes} |")
    return "\n".join([*lines, f"\nThe cache of {build.rows} rows took {build.seconds:.1f} s to build."])


def won_back(build: Build, cached: float, online: float) -> float | None:
    """Return the epochs until the cache has saved its build time, or None if reading it is no faster."""
    saved = 1 / online - 1 / cached
    return build.seconds / build.rows / saved if saved > 0 else None


def losses(runs: Sequence[Run]) -> str:
    """Return a Markdown table of validation loss against seconds, with a column per run."""
    header = [f"{run.kind}, {run.draws} draws" for run in runs]
    lines = ["| steps | " + " | ".join(header) + " |", "|---" * (len(runs) + 1) + "|"]
    for points in zip(*(run.points for run in runs), strict=True):
        cells = [f"{point.loss:.3f} after {point.seconds:.1f} s" for point in points]
        lines.append(f"| {points[0].step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return the (cache, online) pair of each number of draws."""
    return list(zip(runs[::2], runs[1::2], strict=True))


def values(build: Build, runs: Sequence[Run]) -> dict[str, object]:
    found = [
        {
            "prefixes": run.kind,
            "draws": run.draws,
            "rows_per_second": run.rows_per_second,
            "points": [asdict(point) for point in run.points],
        }
        for run in runs
    ]
    return {"machine": machine(), "build": asdict(build), "runs": found}


if __name__ == "__main__":
    main()

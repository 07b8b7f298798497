"""Measure how long training waits for its data. Goal: at most 5 % of its time, with the demo's settings.

    python examples/benchmarks/waiting.py

Every round trains one expert per codec from a cache of recorded demonstrations: `tiny`, stride 10, batch 64, 2 draws.
A step waits from its request for a batch until the batch arrives; the next batch is read and decoded in the meantime.
The figures are those that every run writes to `metrics.jsonl` (`seconds_per_step`, `wait_seconds_per_step`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from caches import tiny_caches
from timing import machine

from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.metrics import read_metrics
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import FlowRecipe, TrainRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of tiny's own weights")
    parser.add_argument("--size", type=int, help="height and width of the editor's input; default: its own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments, Path(scratch))
    if arguments.json:
        print(json.dumps({"machine": machine(), "codecs": found}, indent=2))
        return
    print(f"{machine()}; batch {arguments.batch}, {arguments.draws} draws, {arguments.steps} steps\n")
    print("| codec | ms per step | ms waiting | share |\n|---|---|---|---|")
    for codec, one in found.items():
        step, wait = 1000 * one["seconds_per_step"], 1000 * one["wait_seconds_per_step"]
        print(f"| {codec} | {step:.1f} | {wait:.2f} | {100 * one['share']:.1f} % |")


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Return medians over the rounds for each codec."""
    tiny_caches(arguments, scratch, arguments.episodes, BuildSettings(stride=arguments.stride))
    taken: dict[str, list[tuple[float, float]]] = {codec: [] for codec in arguments.codecs}
    for turn in range(arguments.repetitions):
        for codec in arguments.codecs:
            taken[codec].append(train(arguments, scratch / codec, scratch / f"{codec}-{turn}"))
    found = {}
    for codec, runs in taken.items():
        seconds, waits = (statistics.median(values) for values in zip(*runs, strict=True))
        share = statistics.median(wait / second for second, wait in runs)
        found[codec] = {"seconds_per_step": seconds, "wait_seconds_per_step": waits, "share": share}
    return found


def train(arguments: argparse.Namespace, cache: Path, run: Path) -> tuple[float, float]:
    """Return the seconds per step and the seconds spent waiting, without validation."""
    steps = arguments.steps
    recipe = TrainRecipe(
        steps=steps,
        batch=arguments.batch,
        flow=FlowRecipe(draws=arguments.draws),
        log_every=steps,
        validate_every=steps,
        save_every=steps,
    )
    Trainer(CachedPrefixes(cache), recipe).train(run)
    last = read_metrics(run / "metrics.jsonl")[-1]
    return last["seconds_per_step"], last["wait_seconds_per_step"]


if __name__ == "__main__":
    main()

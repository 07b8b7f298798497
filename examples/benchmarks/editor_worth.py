"""Measure how much a policy gains from the editor's training: the same expert and demonstrations, different prefixes.

    python examples/benchmarks/editor_worth.py --out worth --episodes 25 50 100 200 --seeds 0 1 2

Conditions: `trained` (tiny as shipped), `untrained` (random transformer and text encoder, same VAE),
`blank` (the trained editor sees a grey image, so only text), `text-tokens` (reference tokens dropped from the cache).
Each policy runs the same unseen scenes, and its action chunks are compared with those of the same held-out episodes.
Finished parts are kept, so an interrupted run can be resumed. Writes `worth.json`, tables `worth.md` and a
plot `worth.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagewam_cli.evaluation.statistics import Rate

CONDITIONS: dict[str, tuple[str, ...]] = {
    "trained": (),
    "untrained": ("--random-weights",),
    "blank": ("--blank-images",),
    "text-tokens": ("--segments", "text"),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained policy. error_ratio: squared error of its action chunks on held-out episodes over that of the best
    constant chunk."""

    condition: str
    episodes: int
    seed: int
    scenes: int
    successes: int
    error_ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--episodes", nargs="+", type=int, default=[25, 50, 100, 200])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=50)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    dataset = out / "dataset"
    if not dataset.exists():
        # a tenth is held out for validation: record enough for the largest training set
        imagewam("record", "--episodes", str(max(arguments.episodes) * 10 // 9 + 1), "--out", str(dataset))
    for condition in arguments.conditions:
        options = ("--dataset", str(dataset), "--stride", str(arguments.stride), "--out", str(out / condition))
        imagewam("cache", "--editor", "tiny", *options, *CONDITIONS[condition])
    trials: list[Trial] = []
    for seed in arguments.seeds:  # a whole table per seed, so that an interrupted run still compares all conditions
        for count in arguments.episodes:
            for condition in arguments.conditions:
                run = out / f"run-{condition}-{count}-{seed}"
                trials.append(train_and_evaluate(out / condition, run, count, seed, arguments.steps, arguments.scenes))
                report(out, trials)


def train_and_evaluate(cache: Path, run: Path, episodes: int, seed: int, steps: int, scenes: int) -> Trial:
    recipe = ("--steps", str(steps), "--seed", str(seed), "--set", f"episodes={episodes}")
    if not (run / "result.json").exists():
        imagewam("train-expert", "--cache", str(cache), "--out", str(run), *recipe)
    closed_loop = run / "eval" / "tabletop" / "result.json"
    if not closed_loop.exists():
        imagewam("eval", "--policy", str(run), "--split", "test", "--episodes", str(scenes))
    validation = json.loads((run / "result.json").read_text(encoding="utf-8"))["validation"]
    return Trial(
        condition=cache.name,
        episodes=episodes,
        seed=seed,
        scenes=scenes,
        successes=json.loads(closed_loop.read_text(encoding="utf-8"))["splits"]["test"]["total"]["success"][
            "successes"
        ],
        error_ratio=validation["ratio_to_constant"],
    )


def imagewam(*arguments: str) -> None:
    """Run one public command in a separate process."""
    print("$ imagewam", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "imagewam_cli", "--quiet", *arguments], check=True)


def report(out: Path, trials: Sequence[Trial]) -> None:
    """Write both tables and the plot from the finished parts."""
    (out / "worth.json").write_text(json.dumps([asdict(t) for t in trials], indent=2) + "\n", encoding="utf-8")
    text = (
        "Success on unseen scenes, all seeds together, with a 95 % interval:\n\n"
        + table(trials, success_cell)
        + "\nError of action chunks on held-out episodes over that of the best constant chunk; mean (each seed):\n\n"
        + table(trials, error_cell)
    )
    (out / "worth.md").write_text(text, encoding="utf-8")
    plot(out / "worth.png", trials)


def table(trials: Sequence[Trial], cell: Any) -> str:
    counts = sorted({t.episodes for t in trials})
    lines = ["| prefix | " + " | ".join(f"{c} episodes" for c in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for condition in dict.fromkeys(t.condition for t in trials):
        cells = [cell(of(trials, condition, count)) for count in counts]
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def of(trials: Sequence[Trial], condition: str, episodes: int) -> list[Trial]:
    return [t for t in trials if (t.condition, t.episodes) == (condition, episodes)]


def pooled(trials: Sequence[Trial]) -> Rate:
    return Rate.of(sum(t.successes for t in trials), sum(t.scenes for t in trials))


def success_cell(trials: Sequence[Trial]) -> str:
    if not trials:
        return ""
    rate = pooled(trials)
    each = ", ".join(f"{100 * t.successes / t.scenes:.0f}" for t in trials)
    return f"{100 * rate.rate:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f}; seeds {each})"


def error_cell(trials: Sequence[Trial]) -> str:
    if not trials:
        return ""
    each = ", ".join(f"{t.error_ratio:.2f}" for t in trials)
    return f"{statistics.mean(t.error_ratio for t in trials):.2f} ({each})"


def plot(path: Path, trials: Sequence[Trial]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    success, error = figure.subplots(1, 2)
    for condition in dict.fromkeys(t.condition for t in trials):
        counts = sorted({t.episodes for t in trials if t.condition == condition})
        rates = [pooled(of(trials, condition, c)) for c in counts]
        bars = [[r.rate - r.low for r in rates], [r.high - r.rate for r in rates]]
        success.errorbar(counts, [r.rate for r in rates], yerr=bars, marker="o", capsize=3, label=condition)
        ratios = [[t.error_ratio for t in of(trials, condition, c)] for c in counts]
        means = [statistics.mean(r) for r in ratios]
        bars = [[m - min(r) for m, r in zip(means, ratios, strict=True)]]
        bars.append([max(r) - m for m, r in zip(means, ratios, strict=True)])
        error.errorbar(counts, means, yerr=bars, marker="o", capsize=3, label=condition)
    success.set_ylabel("success on unseen scenes, 95 % interval")
    success.set_ylim(0, 1)
    error.set_ylabel("action error / best constant, range over seeds")
    error.axhline(1, color="grey", linewidth=0.8)
    for axes in (success, error):
        axes.set_xlabel("training episodes")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({t.episodes for t in trials}), [str(c) for c in sorted({t.episodes for t in trials})])
    success.legend(frameon=False)
    figure.savefig(path, dpi=144)


if __name__ == "__main__":
    main()

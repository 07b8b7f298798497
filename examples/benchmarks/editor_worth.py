"""What is the editor's training worth to a policy? The same expert on the same demonstrations, with other prefixes.

    python examples/benchmarks/editor_worth.py --out worth --episodes 25 50 100 200 --seeds 0 1 2

Conditions: `trained` (tiny as shipped), `untrained` (its transformer and text encoder drawn anew, the VAE kept),
`blank` (the
trained editor shown a grey picture: text alone), `text-tokens` (reference tokens dropped from the cache). Each policy
runs
the same unseen scenes. Finished parts are kept, so the command can be stopped and started again. Writes `worth.json`, a
table `worth.md` and a plot `worth.png`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from imagewam_cli.evaluation.statistics import Rate

CONDITIONS: dict[str, tuple[str, ...]] = {
    "trained": (),
    "untrained": ("--random-weights",),
    "blank": ("--blank-images",),
    "text-tokens": ("--segments", "text"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--episodes", nargs="+", type=int, default=[25, 50, 100, 200])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=50)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    dataset = out / "dataset"
    if not dataset.exists():
        # a tenth is held out for validation: record enough for the largest training set
        imagewam("record", "--episodes", str(max(arguments.episodes) * 10 // 9 + 1), "--out", str(dataset))
    successes: dict[str, dict[int, list[int]]] = {}
    for condition in arguments.conditions:
        cache = out / f"cache-{condition}"
        options = ("--editor", "tiny", "--dataset", str(dataset), "--stride", "2", "--out", str(cache))
        imagewam("cache", *options, *CONDITIONS[condition])
        for count in arguments.episodes:
            for seed in arguments.seeds:
                run = out / f"run-{condition}-{count}-{seed}"
                counts = ("--steps", str(arguments.steps), "--seed", str(seed), "--set", f"episodes={count}")
                imagewam("train-expert", "--cache", str(cache), "--out", str(run), *counts)
                result = run / "eval" / "tabletop" / "result.json"
                if not result.exists():
                    imagewam("eval", "--policy", str(run), "--split", "test", "--episodes", str(arguments.scenes))
                total = json.loads(result.read_text())["splits"]["test"]["total"]["success"]
                successes.setdefault(condition, {}).setdefault(count, []).append(total["successes"])
                report(out, successes, arguments.scenes)


def imagewam(*arguments: str) -> None:
    """One public command, in a process of its own."""
    print("$ imagewam", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "imagewam_cli", "--quiet", *arguments], check=True)


def report(out: Path, successes: dict[str, dict[int, list[int]]], scenes: int) -> None:
    """Pool the seeds of each (condition, episodes): success with a 95 % interval, and each seed's own rate."""
    (out / "worth.json").write_text(json.dumps({"scenes": scenes, "successes": successes}, indent=2) + "\n")
    counts = sorted({count for by_count in successes.values() for count in by_count})
    lines = ["| prefix | " + " | ".join(f"{c} episodes" for c in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for condition, by_count in successes.items():
        cells = [cell(Rate.of(sum(s), scenes * len(s)), s, scenes) if (s := by_count.get(c)) else "" for c in counts]
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    (out / "worth.md").write_text("\n".join(lines) + "\n")
    plot(out / "worth.png", successes, scenes)


def cell(rate: Rate, seeds: list[int], scenes: int) -> str:
    each = ", ".join(f"{100 * s / scenes:.0f}" for s in seeds)
    return f"{100 * rate.rate:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f}; seeds {each})"


def plot(path: Path, successes: dict[str, dict[int, list[int]]], scenes: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for condition, by_count in successes.items():
        counts = sorted(by_count)
        rates = [Rate.of(sum(by_count[c]), scenes * len(by_count[c])) for c in counts]
        errors = [[r.rate - r.low for r in rates], [r.high - r.rate for r in rates]]
        axes.errorbar(counts, [r.rate for r in rates], yerr=errors, marker="o", capsize=3, label=condition)
    axes.set_xlabel("training episodes")
    axes.set_ylabel("success on unseen scenes")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)


if __name__ == "__main__":
    main()

"""Find how small a cache can be before the policy trained on it gets worse.

    python examples/benchmarks/small_cache.py --out small --dataset imagewam-demo/dataset --seeds 0 1 2 --scenes 200

Settings: `full` (every layer, bf16), `pca1` and `pca0.5` (a sixteenth and a thirty-second of it, every layer),
`one-layer` (one layer of six in int4, with four expert blocks attending to it), and `no-prefix` (the expert sees only
the state). Every policy is trained like the demo's and runs the same unseen scenes. Finished parts are kept, so an
interrupted run can be resumed. Writes `small.json` and the table `small.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from imagewam_cli.evaluation.statistics import Rate
from imagewam_cli.kvcache.reading.reader import CacheReader

sys.path.insert(0, str(Path(__file__).parent))
from editor_worth import imagewam


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options of `cache` and `train-expert`. cache: name of the setting whose cache is used, if not its own."""

    store: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    cache: str | None = None


SETTINGS = {
    "full": Setting(),
    "pca1": Setting(store=("--codec", "pca1")),
    "pca0.5": Setting(store=("--codec", "pca0.5")),
    "one-layer": Setting(store=("--codec", "int4", "--layers", "3"), train=("--set", "expert.blocks_per_layer=4")),
    "no-prefix": Setting(train=("--set", "expert.use_prefix=false"), cache="full"),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One policy. row_bytes: bytes per row of its cache, or 0 if it does not use one."""

    setting: str
    seed: int
    row_bytes: float
    successes: int
    scenes: int
    error_ratio: float
    """Squared error of action chunks on held-out episodes, divided by that of the best constant chunk."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, help="demonstrations; by default 1200 are recorded, as the demo does")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=1200)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    dataset = arguments.dataset or out / "dataset"
    if not dataset.exists():
        imagewam("record", "--episodes", str(arguments.episodes), "--out", str(dataset))
    trials: list[Trial] = []
    for seed in arguments.seeds:  # a whole table per seed, so that an interrupted run still compares all settings
        for name in arguments.settings:
            store = ("--dataset", str(dataset), "--stride", str(arguments.stride))
            trials.append(trial(out, name, seed, store, arguments.steps, arguments.scenes))
            (out / "small.json").write_text(json.dumps([asdict(t) for t in trials], indent=2) + "\n", encoding="utf-8")
            (out / "small.md").write_text(table(trials), encoding="utf-8")
            print(table(trials), flush=True)


def trial(out: Path, name: str, seed: int, store: Sequence[str], steps: int, scenes: int) -> Trial:
    setting = SETTINGS[name]
    owner = setting.cache or name
    cache, run = out / f"cache-{owner}", out / f"run-{name}-{seed}"
    done = out / f"cache-{owner}.done"
    if not done.exists():
        imagewam("cache", "--editor", "tiny", *store, "--out", str(cache), *SETTINGS[owner].store)
        done.touch()
    if not (run / "result.json").exists():
        recipe = ("--steps", str(steps), "--seed", str(seed), *setting.train)
        imagewam("train-expert", "--cache", str(cache), "--out", str(run), *recipe)
    closed_loop = run / "eval" / "tabletop" / "result.json"
    if not closed_loop.exists():
        imagewam("eval", "--policy", str(run), "--split", "test", "--episodes", str(scenes))
    manifest = CacheReader(cache).manifest
    return Trial(
        setting=name,
        seed=seed,
        row_bytes=0.0 if setting.cache else sum(shard.bytes for shard in manifest.shards) / manifest.rows,
        successes=json.loads(closed_loop.read_text(encoding="utf-8"))["splits"]["test"]["total"]["success"][
            "successes"
        ],
        scenes=scenes,
        error_ratio=json.loads((run / "result.json").read_text(encoding="utf-8"))["validation"]["ratio_to_constant"],
    )


def table(trials: Sequence[Trial]) -> str:
    full = max(t.row_bytes for t in trials)
    lines = [
        "| setting | kB per row | smaller | success, all seeds (95 %) | each seed | action error |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(t.setting for t in trials):
        own = [t for t in trials if t.setting == name]
        rate = Rate.of(sum(t.successes for t in own), sum(t.scenes for t in own))
        size = own[0].row_bytes
        lines.append(
            f"| {name} | {size / 1000:.1f} | {f'{full / size:.1f} times' if size else '-'} "
            f"| {100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f}) "
            f"| {', '.join(f'{100 * t.successes / t.scenes:.1f}' for t in own)} "
            f"| {', '.join(f'{t.error_ratio:.3f}' for t in own)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Measure whether the memory of a build grows with the cache. Goal: 20,000 rows peak at most 200 MB above 1,000.

    python examples/benchmarks/builder_memory.py

For each number of rows, records demonstrations as videos, builds a cache of every frame with `tiny` and its shipped
weights in a separate process, and prints the peak resident memory of that process. With 64x64 pixels and int4, 20,000
rows take minutes on two cores and 0.7 GB of disk; these two settings do not affect the memory that could grow with the
cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import machine

GOAL = 200e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20_000], help="approximate numbers of rows")
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of tiny's own weights")
    parser.add_argument("--size", type=int, default=64, help="height and width of the editor's input")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shard-mb", type=float, default=64.0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments, arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = [in_a_process(Path(scratch) / str(rows), rows) for rows in arguments.rows]
    growth = found[-1]["peak_bytes"] - found[0]["peak_bytes"]
    if arguments.json:
        print(json.dumps({"machine": machine(), "builds": found, "growth_bytes": growth}, indent=2))
        return
    print(f"{machine()}; {arguments.size}x{arguments.size} pixels, {arguments.codec}, batch {arguments.batch}\n")
    print("| rows | shards | seconds | peak memory |\n|---|---|---|---|")
    for one in found:
        print(f"| {one['rows']} | {one['shards']} | {one['seconds']:.0f} | {one['peak_bytes'] / 1e6:.0f} MB |")
    print(f"\n{growth / 1e6:+.0f} MB from the first to the last; the goal is at most {GOAL / 1e6:.0f} MB")


def in_a_process(folder: Path, rows: int) -> dict[str, Any]:
    """Measure in a new process, because the peak memory of a process never falls."""
    from imagewam_cli.sim.record import record
    from imagewam_cli.sim.tabletop.env import TabletopEnvironment

    record(TabletopEnvironment(), folder / "dataset", max(1, round(rows / 38)))  # approximate frames of a demonstration
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    shutil.rmtree(folder)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.editors.installed import load_editor
    from imagewam_cli.editors.settings import PrefixOptions
    from imagewam_cli.kvcache.building.build import build_cache
    from imagewam_cli.kvcache.building.encoding import instructions_of
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings
    from imagewam_cli.registry import Registry

    dataset, installed = open_dataset(folder / "dataset"), Registry.installed()
    editor = load_editor(
        "tiny",
        PrefixOptions(cameras=tuple(dataset.info.cameras), image_size=(arguments.size, arguments.size)),
        instructions=instructions_of(dataset),
        weights=arguments.weights,
    )
    settings = BuildSettings(batch=arguments.batch, shard_mb=arguments.shard_mb)
    started = time.perf_counter()
    manifest = build_cache(dataset, editor, folder / "cache", installed.codecs.load(arguments.codec), settings)
    return {
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the parent before exec
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()

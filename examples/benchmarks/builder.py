"""Compare building a cache with running the editor alone. Goal: at least 95 % of the rows per second.

    python examples/benchmarks/builder.py
    python examples/benchmarks/builder.py --editor instruct-pix2pix --random real --rows 10 --batch 2

Every round builds a whole cache (decode videos, check and encode numbers, compute checksums, flush shards to disk), and
runs the editor on the same batches with images decoded beforehand, dropping K and V. `tiny` uses its shipped weights.
--random DIR uses a pipeline of the released sizes with random weights, written to DIR if it is not there yet
(instruct-pix2pix: 2 GB; on a CPU add --compute-dtype float32).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import islice
from pathlib import Path

from real_dimensions import PIPELINES, SIZES, SMALL_SIZES
from timing import interleaved, machine, table

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Dataset, Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import batches, instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings, plan_build
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment

FORWARD, BUILD = "forward", "build"
ROWS_PER_EPISODE = 38
"""Approximate number of frames of a tabletop demonstration."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a LeRobot dataset; without it, demonstrations are recorded")
    parser.add_argument("--rows", type=int, default=256, help="approximate number of rows to record without --dataset")
    parser.add_argument("--editor", default="tiny")
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of the editor's own weights")
    parser.add_argument("--random", type=Path, help="a folder for random weights of the released sizes")
    parser.add_argument("--size", type=int, help="height and width of the editor's input; default: its own")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16", "float16"], help="by default the editor's")
    parser.add_argument("--codec", default="bf16")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shard-mb", type=float, default=32.0, help="small, to get several shards")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="use tiny sizes with --random, only to check that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, seconds = measure(arguments, Path(scratch))
    share = seconds[FORWARD] / seconds[BUILD]
    if arguments.json:
        found = {"machine": machine(), "rows": rows, "seconds": seconds, "share": share}
        print(json.dumps(found, indent=2))
        return
    print(f"{machine()}; {arguments.editor}, {rows} rows, batch {arguments.batch}, codec {arguments.codec}\n")
    print(table("rows", seconds, FORWARD))
    print(f"\nbuilding runs at {100 * share:.1f} % of the rate of the forward pass, {rows / seconds[BUILD]:.2f} rows/s")


def measure(arguments: argparse.Namespace, scratch: Path) -> tuple[int, dict[str, float]]:
    """Return the number of rows and the median seconds of each alternative."""
    dataset = open_dataset(arguments.dataset or recorded(scratch / "dataset", arguments.rows * arguments.stride))
    editor = loaded(arguments, dataset)
    settings = BuildSettings(stride=arguments.stride, batch=arguments.batch, shard_mb=arguments.shard_mb)
    codec = Registry.installed().codecs.load(arguments.codec)
    cut = decoded(dataset, editor, codec, settings)

    def forward() -> None:
        for batch in cut:
            editor.encode([row.images for row in batch], [row.instruction for row in batch])

    def build() -> None:
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        build_cache(dataset, editor, scratch / "cache", codec, settings)

    calls = {FORWARD: forward, BUILD: build}
    return sum(len(batch) for batch in cut), interleaved(calls, arguments.repetitions)


def decoded(dataset: Dataset, editor: Editor, codec: Codec, settings: BuildSettings) -> list[list[Row]]:
    """Return the batches of a build; each shard starts a new one."""
    rows, found = dataset.rows(stride=settings.stride), []
    for shard in plan_build(dataset, editor.spec, codec, settings).shards:
        count = sum(-(-episode.length // settings.stride) for episode in shard)
        found += list(batches(islice(rows, count), settings.batch))
    return found


def recorded(folder: Path, frames: int) -> Path:
    record(TabletopEnvironment(), folder, max(1, round(frames / ROWS_PER_EPISODE)))
    return folder


def loaded(arguments: argparse.Namespace, dataset: Dataset) -> Editor:
    name, weights, size = arguments.editor, arguments.weights, arguments.size
    editors = Registry.installed().editors
    shape = (size, size) if size else None
    if arguments.random is not None:
        weights = arguments.random / (name + ("-small" if arguments.small else ""))
        shape = shape or (SMALL_SIZES if arguments.small else SIZES)[name]
        if not (weights / "model_index.json").exists():
            PIPELINES[name](editors.get(name), weights, arguments.small)
    return load_editor(
        name,
        PrefixOptions(cameras=tuple(dataset.info.cameras), image_size=shape, compute_dtype=arguments.compute_dtype),
        instructions=instructions_of(dataset),
        weights=weights,
    )


if __name__ == "__main__":
    main()

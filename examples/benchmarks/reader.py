"""Compare reading rows of a cache with plain reads of its files. Goal: at least 80 % of the bytes per second.

    python examples/benchmarks/reader.py
    python examples/benchmarks/reader.py --cache caches/mine

Everything is in the page cache, so this measures the reader and not the disk. For each codec: the shards by Python's
`read()`, one batch of bytes at a time; batches by `CacheReader.gather`, sequential and random, in the first epoch
(which opens shards and verifies checksums) and in a later one; and batches gathered and decoded to float32. Without
--cache, `tiny` builds a cache of recorded demonstrations per codec.

There are two stricter baselines: `readinto` the same cache-line-aligned batch buffer again and again, and `read()` of
1 MiB at a time, which stays in the processor's caches and never reaches main memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from caches import tiny_caches
from timing import interleaved, machine

from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.format.buffers import aligned
from imagewam_cli.kvcache.format.frame_table import Indices
from imagewam_cli.kvcache.format.shard import LoadMethod
from imagewam_cli.kvcache.reading.reader import CacheReader

PLAIN, DECODED = "plain read", "random, later epoch, decoded"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Size of an epoch of one cache, and median seconds to read it in each way."""

    name: str
    rows: int
    bytes: int
    seconds: dict[str, float]
    opening: float
    """Seconds to open a reader and read its first batch."""

    def share(self, way: str) -> float:
        """Return the ratio of this way's rate to that of plain reads."""
        return self.seconds[PLAIN] / self.seconds[way]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="an existing cache, instead of one per codec")
    parser.add_argument("--codecs", nargs="+", default=["bf16", "fp8", "int8", "int4"])
    parser.add_argument("--rows", type=int, default=4096, help="approximate number of rows to record without --cache")
    parser.add_argument("--weights", type=Path, help="a diffusers folder instead of tiny's own weights")
    parser.add_argument("--size", type=int, help="height and width of the editor's input; default: its own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--load", choices=get_args(LoadMethod), default="mmap")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        episodes = max(1, round(arguments.rows / 38))  # approximate frames of a demonstration
        given, folder = arguments.cache, Path(scratch)
        folders = [given] if given else tiny_caches(arguments, folder, episodes, BuildSettings())
        found = [measure(folder, arguments.batch, arguments.load, arguments.repetitions) for folder in folders]
    if arguments.json:
        values = [dataclasses.asdict(one) | {"shares": {way: one.share(way) for way in one.seconds}} for one in found]
        print(json.dumps({"machine": machine(), "load": arguments.load, "caches": values}, indent=2))
        return
    print(f"{machine()}; batches of {arguments.batch} rows, --load {arguments.load}")
    for one in found:
        print("\n" + table(one))


def measure(folder: Path, batch: int, load: LoadMethod, repetitions: int) -> Measured:
    reader = CacheReader(folder, load)
    _ = reader.index
    sequential = list(cut(np.arange(len(reader)), batch))
    shuffled = np.random.default_rng(0).permutation(len(reader))
    random = [np.sort(rows) for rows in cut(shuffled, batch)]
    size = sum(x.nbytes for x in reader.gather(np.arange(1)).values())
    buffer = aligned(min(batch, len(reader)) * size)
    shards = sorted((folder / "shards").iterdir())

    def opened() -> CacheReader:
        fresh = CacheReader(folder, load)
        fresh.gather(sequential[0])
        return fresh

    def first(order: Sequence[Indices]) -> Callable[[], None]:
        readers = [opened() for _ in range(repetitions + 1)]
        turns = iter(readers)
        return lambda: gather(next(turns), order)  # kept open, as in training: closing them is not reading

    calls: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain(shards, lambda file: file.read(len(buffer))),
        "plain read into aligned memory": lambda: plain(shards, lambda file: file.readinto(buffer.data)),
        "plain read, 1 MiB at a time": lambda: plain(shards, lambda file: file.read(2**20)),
        "sequential, first epoch": first(sequential),
        "random, first epoch": first(random),
        "sequential, later epoch": lambda: gather(reader, sequential),
        "random, later epoch": lambda: gather(reader, random),
        DECODED: lambda: decode(reader, random),
    }
    opening = interleaved({"": opened}, repetitions)[""]
    seconds = interleaved(calls, repetitions)
    name, rows = reader.manifest.codec, len(reader)
    return Measured(name=name, rows=rows, bytes=size * rows, seconds=seconds, opening=opening)


def cut(rows: Indices, batch: int) -> Iterator[Indices]:
    for i in range(0, len(rows), batch):
        yield rows[i : i + batch]


def gather(reader: CacheReader, order: Sequence[Indices]) -> None:
    for rows in order:
        reader.gather(rows)


def decode(reader: CacheReader, order: Sequence[Indices]) -> None:
    for rows in order:  # one batch in memory at a time, as in training
        reader.read(rows)


def plain(files: Sequence[Path], read: Callable[[io.FileIO], object]) -> None:
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while read(file):
                pass


def table(one: Measured) -> str:
    """Return a Markdown table of rates, and their ratio to plain reads."""
    lines = [
        f"| {one.name}, {one.bytes / one.rows / 1e3:.0f} kB per row | rows/s | MB/s | / {PLAIN} |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {way} | {one.rows / s:.0f} | {one.bytes / s / 1e6:.0f} | {one.share(way):.2f} |"
        for way, s in one.seconds.items()
    ]
    return "\n".join(lines) + f"\n\nopen the cache and read the first batch: {1000 * one.opening:.0f} ms"


if __name__ == "__main__":
    main()

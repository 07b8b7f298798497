"""Is every changed byte of a cache found, and does none reach training?

    python examples/robustness/flips.py --flips 1000
    python examples/robustness/flips.py --flips 1000 --editor instruct-pix2pix --codec pca1

Flips one bit at a random place of a small cache's files (drawn evenly over all bytes, and a share evenly over the
files, since shards have nearly all bytes), lets `verify` look, reads every row as training does, and puts the byte
back. A few flips also go through the command line. With instruct-pix2pix (small, with random weights) the cache has a
file of what follows from the instruction, with pca1 that of a codec that is fitted. Prints the counts; exit code 1
where a flip was missed.
"""

from __future__ import annotations

import argparse
import collections
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from kills import EDITORS

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.building.verify import verify_cache
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--command-line", type=int, default=20, help="flips that go through `imagewam` too")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--editor", choices=list(EDITORS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = _built(Path(scratch), arguments.codec, arguments.editor)
        sys.exit(campaign(cache, arguments.flips, arguments.command_line, random.Random(arguments.seed)))


def campaign(cache: Path, flips: int, commands: int, rng: random.Random) -> int:
    """Exit code: 0 where every flip was found by `verify`, and by the reader where the reader reads it."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    seen: collections.Counter[str] = collections.Counter()
    missed = 0
    for number in range(flips):
        (path,) = rng.choices(paths, None if number % 4 == 0 else sizes)
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        _flip(path, place, bit)
        found = {"verify": _verify_finds(cache), "reader": _reader_finds(cache)}
        if number < commands:
            found["command line"] = _command_finds(cache)
        _flip(path, place, bit)
        for who, did in found.items():
            seen[f"{who}: {'found' if did else 'missed'}"] += 1
            missed += not did
        seen[f"in {path.name}"] += 1
    assert not _verify_finds(cache)
    assert not _reader_finds(cache)
    for what, count in sorted(seen.items()):
        print(f"{count:5d}  {what}")
    print(f"{flips} flips over {sum(sizes)} bytes of {len(paths)} files, {missed} missed")
    return int(missed > 0)


def _flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def _verify_finds(cache: Path) -> bool:
    try:
        return bool(verify_cache(cache))
    except CacheError:
        return True


def _reader_finds(cache: Path) -> bool:
    """As training reads: every row, and the samples that a policy keeps."""
    try:
        reader = CacheReader(cache)
        reader.read(np.arange(len(reader)))
        reader.samples()
        return False
    except CacheError:
        return True


def _command_finds(cache: Path) -> bool:
    command = [sys.executable, "-m", "imagewam_cli", "--quiet", "cache", "verify", "--cache", str(cache)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 1


def _built(scratch: Path, codec: str, name: str) -> Path:
    record(TabletopEnvironment(), scratch / "dataset", 3, video_codec=None)
    dataset = open_dataset(scratch / "dataset")
    settings = BuildSettings(stride=8, batch=4, shard_mb=0.5)
    editor = EDITORS[name](dataset, scratch / "weights")
    build_cache(dataset, editor, scratch / "cache", Registry.installed().codecs.load(codec), settings)
    return scratch / "cache"


if __name__ == "__main__":
    main()

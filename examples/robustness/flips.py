"""Check that every flipped bit in a cache is found, and that none reaches training.

    python examples/robustness/flips.py --flips 1000
    python examples/robustness/flips.py --flips 1000 --editor instruct-pix2pix --codec pca1

Flips one bit at a random position in the files of a small cache, runs `verify`, reads every row as training does, and
restores the byte. Most positions are drawn uniformly over all bytes, some uniformly over the files, because shards
contain nearly all bytes. A few flips also go through the command line. With instruct-pix2pix (small, with random
weights) the cache also has a file of layers that depend only on the instruction, and with pca1 a file of the fitted
codec. Prints the counts. The exit code is 1 if a flip was missed.
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
from imagewam_cli.kvcache.format.manifest import DATASET_CHECKSUMS, DATASET_FILES
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment

_ABOUT_THE_DATASET = (DATASET_FILES, DATASET_CHECKSUMS)
"""Files that say from which dataset a cache was built. Reading rows does not need them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--command-line", type=int, default=20, help="number of flips that also go through `imagewam`")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--editor", choices=list(EDITORS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = _built(Path(scratch), arguments.codec, arguments.editor)
        sys.exit(campaign(cache, arguments.flips, arguments.command_line, random.Random(arguments.seed)))


def campaign(cache: Path, flips: int, commands: int, rng: random.Random) -> int:
    """Return 0 if `verify` found every flip, and the reader every flip in bytes that it reads."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    seen: collections.Counter[str] = collections.Counter()
    missed = 0
    for number in range(flips):
        (path,) = rng.choices(paths, None if number % 4 == 0 else sizes)
        offset, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        _flip(path, offset, bit)
        found = {"verify": _verify_finds(cache)}
        if path.name not in _ABOUT_THE_DATASET:
            found["reader"] = _reader_finds(cache)
        if number < commands:
            found["command line"] = _command_finds(cache)
        _flip(path, offset, bit)
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


def _flip(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def _verify_finds(cache: Path) -> bool:
    try:
        return bool(verify_cache(cache))
    except CacheError:
        return True


def _reader_finds(cache: Path) -> bool:
    """Read what training reads: every row, and the samples that a policy stores."""
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

"""Check that a cache has the same bytes no matter how often and when its build is killed.

    python examples/robustness/kills.py --kills 200
    python examples/robustness/kills.py --kills 200 --editor instruct-pix2pix --codec pca1

Builds a small cache without interruption. Then builds it again and again in a process that gets SIGKILL at a random
moment, drawn uniformly over the duration of a build, and restarts it until the build is complete. Files that are
written once and quickly would seldom be hit: the file of a fitted codec, and that of layers that depend only on the
instruction (instruct-pix2pix has them; small, with random weights). They get one kill when they are started and one
when they are complete. Processes are forked from one that has loaded the editor, so that no kill hits the start of an
interpreter. Prints the number of kills in each phase, and how many caches differ from the uninterrupted build. The exit
code is 1 if any does.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.building.verify import verify_cache
from imagewam_cli.kvcache.codecs.fitting import CODEC
from imagewam_cli.kvcache.format.manifest import INSTRUCTIONS, SHARDS
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--editor", choices=list(EDITORS), default="tiny")
    parser.add_argument("--shard-mb", type=float, default=1.0)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    with tempfile.TemporaryDirectory() as scratch:
        record(TabletopEnvironment(), Path(scratch) / "dataset", arguments.episodes, video_codec=None)
        dataset = open_dataset(Path(scratch) / "dataset")
        editor = EDITORS[arguments.editor](dataset, Path(scratch) / "weights")
        settings = BuildSettings(stride=arguments.stride, batch=4, shard_mb=arguments.shard_mb)
        codec = Registry.installed().codecs.load(arguments.codec)

        def build(out: Path) -> None:
            build_cache(dataset, editor, out, codec, settings)

        sys.exit(campaign(build, Path(scratch), arguments.kills, random.Random(arguments.seed)))


def campaign(build: Callable[[Path], None], scratch: Path, kills: int, rng: random.Random) -> int:
    """Return 0 if every cache equals the uninterrupted build."""
    whole = scratch / "whole"
    started = time.perf_counter()
    _finish(build, whole)
    seconds, expected = time.perf_counter() - started, _digest(whole)
    print(f"an uninterrupted build takes {seconds:.2f} s", flush=True)
    phases: collections.Counter[str] = collections.Counter()
    caches = different = 0
    written_once = [f"{file}{end}" for file in WRITTEN_ONCE if (whole / file).exists() for end in (".partial", "")]
    while phases.total() < kills:
        out = scratch / f"cache-{caches}"
        if caches < len(written_once):
            if _run_and_kill(build, out, (out / written_once[caches]).exists):
                phases[f"5 as soon as {written_once[caches]} exists"] += 1
        else:
            while phases.total() < kills and _run_and_kill(build, out, _after(rng.uniform(0, seconds))):
                phases[_phase(out)] += 1
        _finish(build, out)
        caches += 1
        different += _digest(out) != expected or bool(verify_cache(out))
    for phase, count in sorted(phases.items()):
        print(f"{count:4d}  {'#' * (60 * count // max(phases.values()))}  {phase}")
    print(f"{phases.total()} kills, {caches} caches, {different} of them differ from the uninterrupted build")
    return int(different > 0)


def _after(seconds: float) -> Callable[[], bool]:
    """Return a function that is True once `seconds` have passed."""
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until


def _run_and_kill(build: Callable[[Path], None], out: Path, kill_when: Callable[[], bool]) -> bool:
    """Run the build, kill it when `kill_when()` is True, and return whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            build(out)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - report any failure to the parent as exit code 1
            os._exit(1)
    ended, status = 0, 0
    while not ended and not kill_when():
        time.sleep(0.0002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a build failed")
    return os.WIFSIGNALED(status)


def _finish(build: Callable[[Path], None], out: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            build(out)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - as above
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("a build failed")


def _phase(out: Path) -> str:
    """Return the phase that the kill interrupted, by the files that it left."""
    if not (out / "manifest.json").exists():
        return "0 before the first manifest"
    names = [path.name for path in out.rglob("*")]
    if "manifest.json.partial" in names:
        return "3 while a manifest is written"
    manifest = (out / "manifest.json").read_text(encoding="utf-8")
    for file in (CODEC, INSTRUCTIONS):
        if f"{file}.partial" in names:
            return f"0a within {file}"
        if file in names and file not in manifest:
            return f"0b {file} is complete but not yet listed in the manifest"
    writing = [name for name in names if name.startswith("shard-") and name.endswith(".partial")]
    listed = manifest.count('"shard-')
    whole = len([name for name in names if name.startswith("shard-")]) - len(writing)
    if whole > listed:
        return "2 a shard is complete but not yet listed in the manifest"
    if len(writing) > 1:
        return "1b one shard is finished, the next begun"
    return f"1a within a shard, {listed} finished" if writing else f"4 between files, {listed} finished"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


SMALL = PrefixOptions(cameras=("top",), image_size=(64, 64))
WRITTEN_ONCE = (CODEC, f"{SHARDS}/{INSTRUCTIONS}")
"""Files of a cache that are written once, before its row shards."""


def tiny(dataset: Dataset, weights: Path | None = None) -> Editor:
    """Load the embedded editor for images of 64 pixels, which give a small cache. weights: unused; it has its own."""
    return load_editor("tiny", SMALL, instructions=instructions_of(dataset))


def instruct_pix2pix(dataset: Dataset, weights: Path) -> Editor:
    """Load the first four layers, two of self-attention and two of cross-attention.

    weights: folder to write a small pipeline with random weights to.
    """
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from real_dimensions import PIPELINES

    editors, name = Registry.installed().editors, "instruct-pix2pix"
    PIPELINES[name](editors.get(name), weights, True)
    settings = dataclasses.replace(SMALL, segments=("text", "target"), layers="0,1,2,3", compute_dtype="float32")
    return load_editor(name, settings, instructions=instructions_of(dataset), weights=weights)


EDITORS = {"tiny": tiny, "instruct-pix2pix": instruct_pix2pix}


if __name__ == "__main__":
    main()

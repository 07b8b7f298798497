"""Is a cache the same, to the bit, however often and whenever its build is killed?

    python examples/robustness/kills.py --kills 200

Builds a small cache with `tiny` undisturbed; then again and again in a process that gets SIGKILL at a random moment,
drawn evenly over the length of a build, and is started anew until the build is done. Processes are forked from one that
has loaded the editor, so that no kill is spent on the start of an interpreter. Prints how many kills met which phase,
and how many caches differed from the undisturbed one (exit code 1 where one did).
"""

from __future__ import annotations

import argparse
import collections
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
from imagewam_cli.editor import Editor, PrefixSettings
from imagewam_cli.kvcache.build import build_cache
from imagewam_cli.kvcache.encoding import instructions_of
from imagewam_cli.kvcache.plan import BuildSettings
from imagewam_cli.kvcache.verify import verify_cache
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--shard-mb", type=float, default=1.0)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    with tempfile.TemporaryDirectory() as scratch:
        record(TabletopEnvironment(), Path(scratch) / "dataset", arguments.episodes, video_codec=None)
        dataset = open_dataset(Path(scratch) / "dataset")
        editor = tiny(dataset)
        settings = BuildSettings(stride=arguments.stride, batch=4, shard_mb=arguments.shard_mb)
        codec = Registry.installed().codecs.load(arguments.codec)

        def build(out: Path) -> None:
            build_cache(dataset, editor, out, codec, settings)

        sys.exit(campaign(build, Path(scratch), arguments.kills, random.Random(arguments.seed)))


def campaign(build: Callable[[Path], None], scratch: Path, kills: int, rng: random.Random) -> int:
    """Exit code: 0 where every cache was the undisturbed one."""
    whole = scratch / "whole"
    started = time.perf_counter()
    _finish(build, whole)
    seconds, expected = time.perf_counter() - started, _digest(whole)
    print(f"an undisturbed build takes {seconds:.2f} s", flush=True)
    phases: collections.Counter[str] = collections.Counter()
    caches = different = 0
    while phases.total() < kills:
        out = scratch / f"cache-{caches}"
        while phases.total() < kills and _killed(build, out, rng.uniform(0, seconds)):
            phases[_phase(out)] += 1
        _finish(build, out)
        caches += 1
        different += _digest(out) != expected or bool(verify_cache(out))
    for phase, count in sorted(phases.items()):
        print(f"{count:4d}  {'#' * (60 * count // max(phases.values()))}  {phase}")
    print(f"{phases.total()} kills, {caches} caches, {different} of them not the undisturbed one")
    return int(different > 0)


def _killed(build: Callable[[Path], None], out: Path, after: float) -> bool:
    """Whether the build was still running when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            build(out)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent is to see any failure as one
            os._exit(1)
    time.sleep(after)
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
    """What the folder looks like after the kill."""
    if not (out / "manifest.json").exists():
        return "0 before the first manifest"
    names = [path.name for path in out.rglob("*")]
    if "manifest.json.partial" in names:
        return "3 while a manifest is written"
    writing = [name for name in names if name.startswith("shard-") and name.endswith(".partial")]
    listed = (out / "manifest.json").read_text().count('"file"')
    whole = len([name for name in names if name.startswith("shard-")]) - len(writing)
    if whole > listed:
        return "2 a shard is there, the manifest does not know of it"
    if len(writing) > 1:
        return "1b one shard is finished, the next begun"
    return f"1a within a shard, {listed} finished" if writing else f"4 between files, {listed} finished"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


SMALL = PrefixSettings(cameras=("top",), image_size=(64, 64))


def tiny(dataset: Dataset) -> Editor:
    """The embedded editor on pictures of 64 pixels, for a small cache."""
    editors = Registry.installed().editors
    editor: Editor = editors.load("tiny").load(editors.get("tiny"), SMALL, instructions=instructions_of(dataset))
    return editor


if __name__ == "__main__":
    main()

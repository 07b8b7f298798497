"""Check that a cache built by many workers, some of them killed, equals the build of one process, byte for byte.

    python examples/robustness/parts.py --ways parts workers ray

Builds a small cache with `tiny` in one process, then again in parts, each in a separate process:

parts    all parts at once; the middle one gets SIGKILL after its first shard, and is restarted
workers  the same with two worker processes per part; a worker of the first part gets SIGKILL too
ray      one part after the other, with two Ray actors each; an actor of the middle part gets SIGKILL

Merges the parts and compares every file. Prints what was killed and compared. The exit code is 1 if a file differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from kills import SMALL, tiny

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.loading.hardware import CPU
from imagewam_cli.kvcache.building.build import build_cache, build_with
from imagewam_cli.kvcache.building.merge import merge_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.building.verify import verify_cache
from imagewam_cli.kvcache.building.workers.pool import WorkerPool, Workers
from imagewam_cli.kvcache.building.workers.processes import ProcessWorkers
from imagewam_cli.kvcache.building.workers.ray import RayWorkers
from imagewam_cli.kvcache.building.workers.worker import BuildJob
from imagewam_cli.kvcache.format.manifest import BuildPart, parse_manifest
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment

SETTINGS = BuildSettings(stride=4, batch=4, shard_mb=1.0)
CODEC = "int8"
WORKERS = {
    "workers": lambda job: ProcessWorkers(job, 2, 1),
    "ray": lambda job: RayWorkers(job, count=2, threads=1),
}
COMMANDS = {"workers": "spawn_main", "ray": "ray::_Actor"}
"""Text in the command line of every worker process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=["parts", "workers", "ray"], default=["parts", "workers", "ray"])
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    with tempfile.TemporaryDirectory() as scratch:
        record(TabletopEnvironment(), Path(scratch) / "dataset", arguments.episodes, video_codec=None)
        campaign = Campaign(Path(scratch), arguments.parts)
        different = [way for way in arguments.ways if not campaign.same(way)]
    sys.exit(int(bool(different)))


class Campaign:
    """The build of one process, and the builds to compare with it."""

    def __init__(self, scratch: Path, parts: int) -> None:
        self.scratch, self.parts = scratch, parts
        self.dataset = open_dataset(scratch / "dataset")
        self.editor: Editor = tiny(self.dataset)
        self.codec = Registry.installed().codecs.load(CODEC)
        build_cache(self.dataset, self.editor, scratch / "single", self.codec, SETTINGS)
        self.expected = _files(scratch / "single")

    def same(self, way: str) -> bool:
        """Merge the parts, print the result, and return whether they equal the build of one process."""
        if way == "ray" and importlib.util.find_spec("ray") is None:
            print("ray: not installed, skipped")
            return True
        out = self.scratch / way
        killed = self._in_turn(way, out) if way == "ray" else self._at_once(way, out)
        merge_cache(out)
        found = _files(out)
        differing = sorted(n for n in found.keys() | self.expected.keys() if found.get(n) != self.expected.get(n))
        if differing or verify_cache(out):
            print(f"{way}: {', '.join(killed)} killed; DIFFERENT: {', '.join(differing)}", flush=True)
            return False
        size = sum(len(content) for content in found.values())
        print(
            f"{way}: {', '.join(killed)} killed; all {len(found)} files, {size} bytes, equal the single-process build"
        )
        return True

    def _at_once(self, way: str, out: Path) -> list[str]:
        children = [self._start(way, out, index) for index in range(self.parts)]
        middle = self.parts // 2
        kill_actions: dict[int, Callable[[], None]] = {middle: lambda: os.kill(children[middle], signal.SIGKILL)}
        killed = [f"part {middle}"]
        if way == "workers":
            kill_actions[0] = lambda: _kill_worker(children[0], way)
            killed.append("a worker of part 0")
        self._with_their_first_shard(out, kill_actions)
        ended = [_wait(child) for child in children]
        if not os.WIFSIGNALED(ended[middle]) or any(e for i, e in enumerate(ended) if i != middle):
            raise SystemExit(f"{way}: a build failed, or ended before it could be killed")
        if _wait(self._start(way, out, middle)):
            raise SystemExit(f"{way}: part {middle} could not be resumed")
        return killed

    def _in_turn(self, way: str, out: Path) -> list[str]:
        middle = self.parts // 2
        for index in range(self.parts):
            child = self._start(way, out, index)
            if index == middle:
                self._with_their_first_shard(out, {index: functools.partial(_kill_worker, child, way)})
            if _wait(child):
                raise SystemExit(f"{way}: part {index} failed")
        return [f"an actor of part {middle}"]

    def _with_their_first_shard(self, out: Path, acts: dict[int, Callable[[], None]]) -> None:
        """Run each of these actions when its part has finished a shard."""
        waiting, until = dict(acts), time.monotonic() + 120
        while waiting:
            if time.monotonic() > until:
                raise SystemExit(f"parts {sorted(waiting)} have no shard after two minutes")
            for index in list(waiting):
                manifest = out / BuildPart(index=index, count=self.parts).manifest
                if manifest.exists() and parse_manifest(manifest.read_bytes(), str(manifest)).shards:
                    waiting.pop(index)()
            time.sleep(0.002)

    def _start(self, way: str, out: Path, index: int) -> int:
        child = os.fork()
        if child:
            return child
        try:
            self._build(way, out, dataclasses.replace(SETTINGS, part=BuildPart(index=index, count=self.parts)))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - report any failure to the parent as exit code 1
            print(f"{way}, part {index}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _build(self, way: str, out: Path, settings: BuildSettings) -> None:
        if way == "parts":
            build_cache(self.dataset, self.editor, out, self.codec, settings)
            return
        job = BuildJob(
            dataset=self.dataset.info.root,
            keys=KeyMap(),
            editor="tiny",
            prefix=SMALL,
            weights=None,
            hardware=CPU,
            out=out,
            codec=CODEC,
            settings=settings,
        )
        workers: Workers = WORKERS[way](job)
        with WorkerPool(workers, out=out, identity=self.dataset.info.identity) as pool:
            build_with(pool, self.dataset, out, self.codec, settings)


def _kill_worker(builder: int, way: str) -> None:
    """Kill the first worker of this build that is found."""
    for process in psutil.Process(builder).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if COMMANDS[way] in " ".join(process.cmdline()):
                process.kill()
                return
    raise SystemExit(f"{way}: no worker to kill was found")


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return status


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


if __name__ == "__main__":
    main()

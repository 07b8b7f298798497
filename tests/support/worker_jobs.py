"""Build jobs that a worker can open in another process, with editors that fail on purpose."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import CacheError, UnknownNameError
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.format.manifest import Manifest
from imagewam_cli.prefix.kv import PrefixKV
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset

Build = Callable[..., Manifest]
"""`build_by` of the worker tests: build the cache of `built` with the given workers."""


class Lost(BaseException):
    """End a worker that runs as a thread, like SIGKILL ends a process."""


def lose() -> None:
    raise Lost


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain() -> None:
    raise CacheError("the editor is out of ink", "buy some")


def mistype() -> None:
    raise UnknownNameError("editor", "tinny", ["tiny"])


class MinedEditor(ArithmeticEditor):
    """Call the job's `happens` at the first image of its episode, in the first `times` workers that reach it."""

    def __init__(self, job: ArithmeticJob, *, weights: str) -> None:
        super().__init__(weights=weights)
        self._job = job
        (first,) = list(MemoryDataset(LENGTHS).rows(episodes=[job.episode]))[:1]
        self._picture = first.images["top"]

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        if any(np.array_equal(row["top"], self._picture) for row in images):
            before = len(list(self._job.marks.iterdir())) if self._job.times else 0
            if before < self._job.times:
                (self._job.marks / str(before)).touch()
                self._job.happens()
        return super().encode(images, instructions)


@dataclass(frozen=True, kw_only=True)
class ArithmeticJob:
    """The same build as the one in the fixture `built`."""

    out: Path
    marks: Path
    """Folder with one file for each call of `happens`."""
    episode: int = 1
    times: int = 0
    happens: Callable[[], None] = kill
    strangers: tuple[int, ...] = ()
    """Indices of workers whose editor has other weights."""

    def open(self, slot: int) -> tuple[ShardBuilder, Sequence[str]]:
        dataset = MemoryDataset(LENGTHS)
        editor = MinedEditor(self, weights="others" if slot in self.strangers else "weights")
        self.out.mkdir(parents=True, exist_ok=True)
        return ShardBuilder(dataset, editor, self.out, FLOAT32, SETTINGS), instructions_of(dataset)

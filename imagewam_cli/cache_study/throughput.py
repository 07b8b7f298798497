"""Does it pay to store prefixes on this machine, or is computing them again faster than reading them?

Everything is measured by doing it: rows go through the editor, through the codec into a shard on the disk in question,
are dropped from the page cache, and are read, checked and decoded as training reads them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.types import Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.kvcache.building.encoding import stored_tensors
from imagewam_cli.kvcache.building.shard_plan import bytes_per_row
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.fitting import fitted_to
from imagewam_cli.kvcache.codecs.prefix import INSTRUCTION_INDEX, decode_prefix, stored_parts
from imagewam_cli.kvcache.format.shard import INDEX_KEYS, Shard, ShardWriter
from imagewam_cli.prefix.kv import PrefixKV

_SAMPLE_BYTES = 64e6
_MOST_ROWS = 256
_FORWARDS = 2
_FORWARD_SECONDS = 20.0
"""About how long one forward may take."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Seconds of one row on this machine."""

    row_bytes: int
    forward: float
    """The editor."""
    write: float
    """Codec, checksums and disk."""
    read: float
    """Disk, with nothing of it in memory, and checksums."""
    decode: float

    @property
    def worth_storing(self) -> bool:
        """Whether a row is read faster than it is computed."""
        return self.load < self.forward

    @property
    def load(self) -> float:
        """What training waits for, where it waits: reading and decoding."""
        return self.read + self.decode

    @property
    def break_even_epochs(self) -> float | None:
        """Over the rows, after which building and reading took less than computing each time; None: never."""
        return (self.forward + self.write) / (self.forward - self.load) if self.worth_storing else None

    @property
    def break_even_bytes(self) -> float:
        """Of a row that would be read as fast as it is computed, decoding aside."""
        return self.row_bytes * self.forward / self.read


def measure(editor: Editor, codecs: Sequence[Codec], rows: Sequence[Row], folder: Path) -> list[Throughput]:
    """Of each codec. rows: one batch, as a build would take it, of which fewer are looked at where a forward is slow;
    folder: on the disk that the cache is for. Leaves nothing there."""
    rows = rows[: max(1, int(_FORWARD_SECONDS / _seconds(lambda: _prefix(editor, rows[:1]))))]
    prefix = _prefix(editor, rows)
    forward = min(_seconds(lambda: _prefix(editor, rows)) for _ in range(_FORWARDS)) / len(rows)
    return [_of_codec(editor, codec, rows, prefix, forward, folder) for codec in codecs]


def _of_codec(
    editor: Editor, codec: Codec, rows: Sequence[Row], prefix: PrefixKV, forward: float, folder: Path
) -> Throughput:
    codec = fitted_to(codec, editor.spec, [prefix])
    started = time.perf_counter()
    tensors = stored_tensors(prefix, editor.spec, codec)
    coding = (time.perf_counter() - started) / len(rows)
    row_bytes = bytes_per_row(editor.spec, codec)
    times = max(1, int(min(_MOST_ROWS, _SAMPLE_BYTES / row_bytes) // len(rows)))
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as scratch:
        path = Path(scratch) / "sample.safetensors"
        write = _written(path, editor, codec, len(rows), tensors, times) / (times * len(rows))
        read, stored = _read(path, times * len(rows))
    stored |= _of_instructions(prefix, editor, codec, [row.instruction for row in rows], times)
    decode = _seconds(lambda: decode_prefix(stored, editor.spec, codec)) / (times * len(rows))
    return Throughput(row_bytes=row_bytes, forward=forward, write=coding + write, read=read, decode=decode)


def _prefix(editor: Editor, rows: Sequence[Row]) -> PrefixKV:
    return editor.encode([r.images for r in rows], [r.instruction for r in rows]).to("cpu")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _of_instructions(
    prefix: PrefixKV, editor: Editor, codec: Codec, instructions: Sequence[str], times: int
) -> dict[str, Tensor]:
    """What a reader adds to rows of these instructions, so many times over: read once, it is not part of a row's
    cost."""
    if not stored_parts(editor.spec, codec, by_instruction=True):
        return {}
    distinct = list(dict.fromkeys(instructions))
    first = [instructions.index(text) for text in distinct]
    once = stored_tensors(prefix, editor.spec, codec, by_instruction=True)
    places = torch.tensor([distinct.index(text) for text in instructions] * times)
    return {name: tensor[first] for name, tensor in once.items()} | {INSTRUCTION_INDEX: places}


def _written(
    path: Path,
    editor: Editor,
    codec: Codec,
    count: int,
    tensors: Mapping[str, Tensor],
    times: int,
) -> float:
    """count: rows of the tensors, which are written so many times."""
    started = time.perf_counter()
    index = {name: [0] * count for name in INDEX_KEYS}
    with ShardWriter(path, times * count, stored_parts(editor.spec, codec)) as writer:
        for _ in range(times):
            writer.append(index, tensors)
        writer.finish()
    return time.perf_counter() - started


def _read(path: Path, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of a row, and what was read."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    stored = Shard.open(path).read(np.arange(rows))
    return (time.perf_counter() - started) / rows, stored

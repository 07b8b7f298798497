"""Does it pay to store prefixes on this machine, or is computing them again faster than reading them?

Everything is measured by doing it: rows go through the editor, through the codec into a shard on the disk in question,
are dropped from the page cache, and are read, checked and decoded as training reads them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.types import Row
from imagewam_cli.editor import Editor
from imagewam_cli.kvcache.build import bytes_per_row, encode_rows
from imagewam_cli.kvcache.codec import PLACE, Codec, decode_prefix, stored_parts
from imagewam_cli.kvcache.shard import INDEX_KEYS, Shard, ShardWriter

_SAMPLE_BYTES = 64e6
_MOST_ROWS = 256
_FORWARDS = 2


@dataclass(frozen=True, kw_only=True)
class Economy:
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
    def pays(self) -> bool:
        """Whether a row is read faster than it is computed."""
        return self.load < self.forward

    @property
    def load(self) -> float:
        """What training waits for, where it waits: reading and decoding."""
        return self.read + self.decode

    @property
    def passes(self) -> float | None:
        """Over the rows, after which building and reading took less than computing each time; None: never."""
        return (self.forward + self.write) / (self.forward - self.load) if self.pays else None

    @property
    def break_even_bytes(self) -> float:
        """Of a row that would be read as fast as it is computed, decoding aside."""
        return self.row_bytes * self.forward / self.read


def measure(editor: Editor, codec: Codec, rows: Sequence[Row], folder: Path) -> Economy:
    """rows: one batch, as a build would take it; folder: on the disk that the cache is for. Leaves nothing there."""
    images, instructions = [r.images for r in rows], [r.instruction for r in rows]
    editor.encode(images, instructions).to("cpu")
    started = time.perf_counter()
    for _ in range(_FORWARDS):
        editor.encode(images, instructions).to("cpu")
    forward = (time.perf_counter() - started) / (_FORWARDS * len(rows))
    numbers = {text: i for i, text in enumerate(dict.fromkeys(instructions))}
    started = time.perf_counter()
    index, tensors = encode_rows(editor, codec, rows, numbers)
    coding = max(0.0, (time.perf_counter() - started) / len(rows) - forward)
    row_bytes = bytes_per_row(editor.spec, codec)
    times = max(1, int(min(_MOST_ROWS, _SAMPLE_BYTES / row_bytes) // len(rows)))
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as scratch:
        path = Path(scratch) / "sample.safetensors"
        write = _written(path, editor, codec, index, tensors, times) / (times * len(rows))
        read, stored = _read(path, times * len(rows))
    once = _of_instructions(editor, codec, rows, numbers, times)
    started = time.perf_counter()
    decode_prefix(stored | once, editor.spec, codec)
    decode = (time.perf_counter() - started) / (times * len(rows))
    return Economy(row_bytes=row_bytes, forward=forward, write=coding + write, read=read, decode=decode)


def _of_instructions(
    editor: Editor, codec: Codec, rows: Sequence[Row], numbers: Mapping[str, int], times: int
) -> dict[str, Tensor]:
    """What a reader adds for rows that came `times` times: read once, it is not part of a row's cost."""
    if not stored_parts(editor.spec, codec, by_instruction=True):
        return {}
    first = {row.instruction: row for row in reversed(rows)}
    _, tensors = encode_rows(editor, codec, [first[text] for text in numbers], numbers, by_instruction=True)
    return tensors | {PLACE: torch.tensor([numbers[row.instruction] for row in rows] * times)}


def _written(
    path: Path,
    editor: Editor,
    codec: Codec,
    index: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    times: int,
) -> float:
    started = time.perf_counter()
    count = len(index[INDEX_KEYS[0]])
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
    shard, places = Shard.open(path), np.arange(rows)
    arrays = shard.blank(rows)
    shard.take(places, arrays, places)
    return (time.perf_counter() - started) / rows, shard.tensors(arrays)


def verdict(economy: Economy) -> str:
    """In one line."""
    row, load, forward = economy.row_bytes / 1e6, 1000 * economy.load, 1000 * economy.forward
    sizes = f"{row:.2f} MB/row reads in {load:.1f} ms, recomputing costs {forward:.1f} ms"
    if economy.passes is None:
        return f"do not store: {sizes}; train with --online, or store fewer bytes (--codec, --pool, --layers)"
    return f"store: {sizes}; won back after {economy.passes:.1f} passes over the rows"

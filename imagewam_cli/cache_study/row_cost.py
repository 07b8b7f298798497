"""Measure whether this machine reads stored prefixes faster than it computes them.

A sample takes the real path: the editor computes it, the codec encodes it into a shard on the given disk, the shard is
dropped from the page cache, and its rows are read, verified and decoded as in training.
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
"""Size of the sample shard; less if `_MAX_ROWS` rows are smaller."""
_MAX_ROWS = 256
_PASSES = 2
_FORWARD_SECONDS = 20.0
"""Approximate limit on the time of one forward pass: slow editors measure a smaller batch."""


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """Cost of one row on this machine: its bytes, and the seconds of each stage."""

    row_bytes: int
    forward: float
    """Seconds to compute the prefix."""
    write: float
    """Seconds to encode, checksum and write it."""
    read: float
    """Seconds to read it from disk (with a cold page cache) and verify it."""
    decode: float
    """Seconds to decode it to float32."""

    @property
    def worth_storing(self) -> bool:
        """True if loading a row is faster than computing it."""
        return self.load < self.forward

    @property
    def load(self) -> float:
        """Seconds to read and decode a row."""
        return self.read + self.decode

    @property
    def break_even_epochs(self) -> float | None:
        """Epochs after which building the cache and loading from it is cheaper than computing; None: never."""
        return (self.forward + self.write) / (self.forward - self.load) if self.worth_storing else None

    @property
    def break_even_bytes(self) -> float:
        """Largest row that would still be read as fast as it is computed, ignoring the time to decode."""
        return self.row_bytes * self.forward / self.read


def measure(editor: Editor, codecs: Sequence[Codec], rows: Sequence[Row], folder: Path) -> list[RowCost]:
    """Measure each codec on one batch; slow editors use fewer rows.

    rows: a batch as a build would encode it. folder: a folder on the disk to measure; its sample is deleted.
    """
    rows = rows[: max(1, int(_FORWARD_SECONDS / _seconds(lambda: _prefix(editor, rows[:1]))))]
    prefix = _prefix(editor, rows)
    forward = min(_seconds(lambda: _prefix(editor, rows)) for _ in range(_PASSES)) / len(rows)
    return [_measure_codec(editor, codec, rows, prefix, forward, folder) for codec in codecs]


def _measure_codec(
    editor: Editor, codec: Codec, rows: Sequence[Row], prefix: PrefixKV, forward: float, folder: Path
) -> RowCost:
    codec = fitted_to(codec, editor.spec, [prefix])
    started = time.perf_counter()
    tensors = stored_tensors(prefix, editor.spec, codec)
    coding = (time.perf_counter() - started) / len(rows)
    row_bytes = bytes_per_row(editor.spec, codec)
    times = max(1, int(min(_MAX_ROWS, _SAMPLE_BYTES / row_bytes) // len(rows)))
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as scratch:
        path = Path(scratch) / "sample.safetensors"
        write = _write_seconds(path, editor, codec, len(rows), tensors, times) / (times * len(rows))
        read, stored = _read_cold(path, times * len(rows))
    stored |= _instruction_tensors(prefix, editor, codec, [row.instruction for row in rows], times)
    decode = _seconds(lambda: decode_prefix(stored, editor.spec, codec)) / (times * len(rows))
    return RowCost(row_bytes=row_bytes, forward=forward, write=coding + write, read=read, decode=decode)


def _prefix(editor: Editor, rows: Sequence[Row]) -> PrefixKV:
    return editor.encode([r.images for r in rows], [r.instruction for r in rows]).to("cpu")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _instruction_tensors(
    prefix: PrefixKV, editor: Editor, codec: Codec, instructions: Sequence[str], times: int
) -> dict[str, Tensor]:
    """Return the tensors stored once per instruction, and their index for `times` copies of the rows.

    A reader reads them once, so they do not count towards the cost of a row.
    """
    if not stored_parts(editor.spec, codec, by_instruction=True):
        return {}
    distinct = list(dict.fromkeys(instructions))
    first = [instructions.index(text) for text in distinct]
    once = stored_tensors(prefix, editor.spec, codec, by_instruction=True)
    index = torch.tensor([distinct.index(text) for text in instructions] * times)
    return {name: tensor[first] for name, tensor in once.items()} | {INSTRUCTION_INDEX: index}


def _write_seconds(
    path: Path,
    editor: Editor,
    codec: Codec,
    count: int,
    tensors: Mapping[str, Tensor],
    times: int,
) -> float:
    """Write `times` copies of the tensors to a shard; return the seconds. count: rows in the tensors."""
    started = time.perf_counter()
    index = {name: [0] * count for name in INDEX_KEYS}
    with ShardWriter(path, times * count, stored_parts(editor.spec, codec)) as writer:
        for _ in range(times):
            writer.append(index, tensors)
        writer.finish()
    return time.perf_counter() - started


def _read_cold(path: Path, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Read the shard with a cold page cache; return the seconds per row, and its tensors."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    stored = Shard.open(path).read(np.arange(rows))
    return (time.perf_counter() - started) / rows, stored

"""Reading a cache: random access to rows. Knows nothing of training."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.editor import PrefixKV
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.buffers import Buffers
from imagewam_cli.kvcache.codec import Codec, decode_prefix, stored_parts
from imagewam_cli.kvcache.manifest import SHARDS, TABLE, Manifest, has_checksum, read_manifest, repair_hint
from imagewam_cli.kvcache.shard import INDEX_KEYS, LoadMethod, Shard
from imagewam_cli.kvcache.table import FrameTable, Indices
from imagewam_cli.registry import Registry

_OPEN_SHARDS = 512
"""At most so many are mapped and described in memory: a cache may have tens of thousands."""


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """Which dataset frame each cached row is: int64 (N,) each; `instruction` indexes the manifest's list."""

    row: Indices
    episode: Indices
    frame: Indices
    instruction: Indices


def row_index(table: FrameTable, episodes: Iterable[int], stride: int) -> RowIndex:
    """Of every `stride`-th frame of these episodes."""
    row, episode, frame = table.frames(episodes, stride)
    return RowIndex(row=row, episode=episode, frame=frame, instruction=table.instruction[row])


class CacheReader:
    """A cache folder, opened. `read(indices)` gives the prefix of any cached rows, numbered 0 .. len - 1 in build
    order. Nothing is given that was not held against its checksum: a shard's head when the shard is opened, a row
    when it is first read.

    Threads may share a reader. Pickled, it is opened again where it is unpickled, as the workers of a
    `torch.utils.data.DataLoader` do.
    """

    def __init__(self, folder: Path, method: LoadMethod = "mmap", *, open_shards: int = _OPEN_SHARDS) -> None:
        """Read the manifest. open_shards: those used longest ago are closed when there are more.

        Raises:
            CacheError: no cache, damaged, or without a single finished shard.
        """
        manifest = read_manifest(folder)
        if manifest.rows == 0:
            raise CacheError(f"{folder} has no finished shard yet", "run the same `imagewam cache` command again")
        self._set_up(folder, method, open_shards, manifest)

    def _set_up(self, folder: Path, method: LoadMethod, open_shards: int, manifest: Manifest) -> None:
        self.folder, self.method, self.manifest = folder, method, manifest
        self.codec: Codec = Registry.installed().codecs.load(manifest.codec)
        self._starts = np.cumsum([0, *self.shard_rows])
        self._most_open = open_shards
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._checked: dict[int, npt.NDArray[np.bool_]] = {}
        """Of each shard that was opened, its rows that were checked: they outlast its closing."""
        self._buffers, self._opening = Buffers(), threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folder, self.method, self._most_open, self.manifest

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set_up(*state)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """How many rows each shard has, in the order of the rows."""
        return tuple(shard.rows for shard in self.manifest.shards)

    @functools.cached_property
    def table(self) -> FrameTable:
        return FrameTable.load(self.folder / TABLE, self.manifest.files.get(TABLE, ""))

    @functools.cached_property
    def index(self) -> RowIndex:
        """Of all rows, from the manifest and the table: no shard is opened."""
        episodes = [episode for shard in self.manifest.shards for episode in shard.episodes]
        index = row_index(self.table, episodes, self.manifest.dataset.stride)
        if len(index.row) != len(self):
            raise CacheError(
                f"{self.folder}: its table has {len(index.row)} rows for its shards, its manifest {len(self)}",
                repair_hint(self.folder),
            )
        return index

    def samples(self) -> bytes | None:
        """The file of samples; None where the cache has none.

        Raises:
            CacheError: missing or damaged.
        """
        checksum = self.manifest.files.get(SAMPLES)
        if checksum is not None and not has_checksum(self.folder / SAMPLES, checksum):
            raise CacheError(
                f"{self.folder / SAMPLES} is missing or differs from its checksum", repair_hint(self.folder)
            )
        return None if checksum is None else (self.folder / SAMPLES).read_bytes()

    def read(self, indices: Indices, *, device: torch.device | str = "cpu") -> PrefixKV:
        """The decoded prefix of the rows, float32, in the order of `indices`."""
        return self.decode(self.gather(indices), device=device)

    def gather(self, indices: Indices) -> dict[str, Tensor]:
        """The rows' tensors as they are stored, by their names in the shards.

        Copies and checksums, on one thread, so that it can run beside a computation without taking its processors.
        """
        if not len(indices):
            raise ValueError("no rows to read")
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows are numbered 0 to {len(self) - 1}, not {indices.min()} to {indices.max()}")
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        shard = self._shard(int(shard_of[0]))
        arrays = shard.blank(len(indices), self._buffers.empty)
        for number in np.unique(shard_of):
            places = np.nonzero(shard_of == number)[0]
            self._shard(int(number)).take(indices[places] - self._starts[number], arrays, places)
        return shard.tensors(arrays)

    def decode(self, stored: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> PrefixKV:
        """float32 K and V of what `gather` returned, decoded on the device: compact numbers travel, not wide ones."""
        moved = {name: tensor.to(device) for name, tensor in stored.items()}
        return decode_prefix(moved, self.manifest.spec, self.codec)

    def _shard(self, number: int) -> Shard:
        with self._opening:
            if number not in self._open:
                self._open[number] = self._opened(number)
                if len(self._open) > self._most_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def _opened(self, number: int) -> Shard:
        entry = self.manifest.shards[number]
        shard = Shard.open(self.folder / SHARDS / entry.file, self.method)
        shard.require_listed(entry.bytes, entry.checksum)
        self._require_parts(shard)
        self._require_rows(shard, number)
        shard.checked = self._checked.setdefault(number, shard.checked)
        return shard

    def _require_parts(self, shard: Shard) -> None:
        """K and V must be those that the manifest describes, or an expert of other heads would train on them."""
        expected, found = stored_parts(self.manifest.spec, self.codec), shard.parts()
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise CacheError(
                    f"{shard.path}: {name} is {found.get(name)}, the manifest says {expected.get(name)}",
                    "build the cache again in another folder",
                )

    def _require_rows(self, shard: Shard, number: int) -> None:
        """The rows must be those of the manifest's episodes: a shard in another's place is sound in itself."""
        rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
        for key in INDEX_KEYS:
            if not np.array_equal(shard.array(key), getattr(self.index, key)[rows]):
                raise CacheError(
                    f"{shard.path} holds other rows than the manifest says: {key} differs", repair_hint(self.folder)
                )

"""Read rows of a cache in any order. Independent of training."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.errors import CacheError
from imagewam_cli.files import has_checksum
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.fitting import stored_codec
from imagewam_cli.kvcache.codecs.prefix import INSTRUCTION_INDEX, decode_prefix, stored_parts
from imagewam_cli.kvcache.format.buffers import Buffers
from imagewam_cli.kvcache.format.frame_table import FrameTable, Indices
from imagewam_cli.kvcache.format.manifest import TABLE, Manifest, ShardEntry
from imagewam_cli.kvcache.format.row_layout import RowLayout
from imagewam_cli.kvcache.format.shard import INDEX_KEYS, LoadMethod, Shard
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.kvcache.storage.manifests import manifest_at, storage_at
from imagewam_cli.prefix.kv import PrefixKV

ROWS, INSTRUCTION_ROWS = "rows", "instruction.rows"
"""Keys of the tensors that `CacheReader.gather` returns: the bytes of the rows, and the bytes of their instructions'
rows."""
_OPEN_SHARDS = 512
"""Maximum number of shards to keep open: a cache may have tens of thousands."""


_State = tuple[Location, LoadMethod, int, Manifest]
"""Pickled state of a `CacheReader`: the arguments of `_set_up`."""


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """The dataset frame of each cached row; every field is (N,) int64."""

    row: Indices
    """Row of the dataset, and of the frame table."""
    episode: Indices
    frame: Indices
    """Position of the frame in its episode."""
    instruction: Indices
    """Index into the manifest's instructions."""
    variant: Indices
    """Number of the augmented view; 0 is as recorded."""


def row_index(table: FrameTable, episodes: Iterable[int], stride: int, variants: int = 1) -> RowIndex:
    """Return the index of a cache with `variants` views of every `stride`-th frame of these episodes."""
    row, episode, frame = (np.repeat(column, variants) for column in table.frames(episodes, stride))
    variant = np.arange(len(row)) % variants
    return RowIndex(row=row, episode=episode, frame=frame, instruction=table.instruction[row], variant=variant)


class CacheReader:
    """Random access to the rows of a cache, in a folder or at a URL. Remote files are downloaded on first use.

    `read(indices)` returns the prefixes of any rows, numbered 0 .. len - 1 in build order. Every byte is verified
    against its checksum before it is returned: a shard's head when the shard is opened, a row when it is first read.

    Threads may share a reader. Processes may not share its connections: unpickling opens the cache again, and a forked
    process reconnects, so each worker of a `torch.utils.data.DataLoader` has its own.
    """

    def __init__(self, address: Location, method: LoadMethod = "mmap", *, open_shards: int = _OPEN_SHARDS) -> None:
        """Read the manifest. open_shards: maximum number of open shards; the least recently used is closed first.

        Raises:
            CacheError: there is no cache, its manifest is damaged, or no shard is finished.
        """
        manifest = manifest_at(storage_at(address))
        if manifest.rows == 0:
            raise CacheError(f"{address} has no finished shard yet", "run the same `imagewam cache` command again")
        self._set_up(address, method, open_shards, manifest)

    def _set_up(self, address: Location, method: LoadMethod, open_shards: int, manifest: Manifest) -> None:
        self.address, self.method, self.manifest = address, method, manifest
        self.codec: Codec = stored_codec(self.storage, manifest)
        self._starts = np.cumsum([0, *self.shard_rows])
        self._most_open = open_shards
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._checked: dict[Path, npt.NDArray[np.bool_]] = {}
        """Flags of the verified rows of each file. Kept after the file is closed, so rows are verified once."""
        self._buffers, self._opening = Buffers(), threading.Lock()
        _readers.add(self)

    def __getstate__(self) -> _State:
        return self.address, self.method, self._most_open, self.manifest

    def __setstate__(self, state: _State) -> None:
        self._set_up(*state)

    def reset_after_fork(self) -> None:
        """Reset the state that a fork must not share: the store's client, and a lock that the parent may hold."""
        self.__dict__.pop("storage", None)
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.rows

    @functools.cached_property
    def storage(self) -> Storage:
        """Storage of the cache."""
        return storage_at(self.address)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Number of rows in each shard, in row order."""
        return tuple(shard.rows for shard in self.manifest.shards)

    @functools.cached_property
    def table(self) -> FrameTable:
        """States and actions of every dataset frame.

        Raises:
            CacheError: missing or damaged.
        """
        checksum = self.manifest.files.get(TABLE, "")
        return FrameTable.load(self.storage.file(TABLE, checksum), checksum)

    @functools.cached_property
    def index(self) -> RowIndex:
        """Index of all rows, computed from the manifest and the table without opening a shard."""
        episodes = [episode for shard in self.manifest.shards for episode in shard.episodes]
        dataset = self.manifest.dataset
        index = row_index(self.table, episodes, dataset.stride, dataset.augmentation.variants)
        if len(index.row) != len(self):
            raise CacheError(
                f"{self.storage.address}: the frame table implies {len(index.row)} cached rows, "
                f"but the manifest lists {len(self)}",
                self.storage.repair,
            )
        return index

    def samples(self) -> bytes | None:
        """Return the content of the samples file, or None if the cache has none.

        Raises:
            CacheError: it is missing or damaged.
        """
        checksum = self.manifest.files.get(SAMPLES)
        if checksum is None:
            return None
        path = self.storage.file(SAMPLES, checksum)
        if not has_checksum(path, checksum):
            raise CacheError(f"{path} is missing or differs from its checksum", self.storage.repair)
        return path.read_bytes()

    def read(self, indices: Indices | Sequence[int], *, device: torch.device | str = "cpu") -> PrefixKV:
        """Return the decoded prefixes of the rows, float32, in the order of `indices`."""
        return self.decode(self.gather(np.asarray(indices, np.int64)), device=device)

    def gather(self, indices: Indices) -> dict[str, Tensor]:
        """Read rows without decoding them, as (N, bytes) uint8: for `tensors`, `decode`, or another process.

        At most two threads copy and verify, so a computation can run at the same time.
        """
        if not len(indices):
            raise ValueError("no rows to read")
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows are numbered 0 to {len(self) - 1}, not {indices.min()} to {indices.max()}")
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        numbers: list[int] = np.unique(shard_of).tolist()
        entries = self.manifest.shards
        rows = self._layout.blank(len(indices), self._buffers.empty)
        for number in numbers:  # finish each shard before opening the next, which may evict its local copy
            shard = self._shard(entries[number])
            positions = np.nonzero(shard_of == number)[0]
            shard.take(indices[positions] - self._starts[number], rows, positions)
        return {ROWS: torch.from_numpy(rows)} | self._gather_instructions(indices)

    def _gather_instructions(self, indices: Indices) -> dict[str, Tensor]:
        """Read the rows stored once per instruction, and the index of each row's instruction among them."""
        entry = self.manifest.by_instruction
        if entry is None:
            return {}
        shard = self._shard(entry)
        distinct, instruction = np.unique(self.index.instruction[indices], return_inverse=True)
        rows = self._instruction_layout.blank(len(distinct))
        shard.take(distinct, rows, np.arange(len(distinct)))
        return {INSTRUCTION_ROWS: torch.from_numpy(rows), INSTRUCTION_INDEX: torch.from_numpy(instruction)}

    def tensors(self, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return views of the gathered bytes as tensors, named as in the shards.

        Tensors stored per instruction have one row per instruction; `INSTRUCTION_INDEX` assigns one to each row.
        """
        found = self._layout.tensors(gathered[ROWS])
        if INSTRUCTION_ROWS in gathered:
            found |= self._instruction_layout.tensors(gathered[INSTRUCTION_ROWS])
            found[INSTRUCTION_INDEX] = gathered[INSTRUCTION_INDEX]
        return found

    def decode(self, gathered: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> PrefixKV:
        """Decode what `gather` returned to float32 K and V. Moves the encoded bytes to the device first."""
        moved = {
            name: gathered[name].to(device) for name in (ROWS, INSTRUCTION_ROWS, INSTRUCTION_INDEX) if name in gathered
        }
        return decode_prefix(self.tensors(moved), self.manifest.spec, self.codec)

    @functools.cached_property
    def _layout(self) -> RowLayout:
        return RowLayout.from_parts(stored_parts(self.manifest.spec, self.codec))

    @functools.cached_property
    def _instruction_layout(self) -> RowLayout:
        return RowLayout.from_parts(stored_parts(self.manifest.spec, self.codec, by_instruction=True))

    def _shard(self, entry: ShardEntry) -> Shard:
        """Return the open shard, opening it if needed. One thread at a time, since opening one may close another."""
        with self._opening:
            if entry.file not in self._open or self.storage.evictable:
                self._reopen(entry)
            self._open.move_to_end(entry.file)
            return self._open[entry.file]

    def _reopen(self, entry: ShardEntry) -> None:
        path = self.storage.shard(entry)
        for renewed in self.storage.evicted():  # an evicted file occupies disk space until its memory map is closed
            self._checked.pop(renewed, None)
            for other in [name for name, shard in self._open.items() if shard.path == renewed]:
                del self._open[other]
        if entry.file in self._open:
            return
        shard = Shard.open(path, self.method, self.storage.repair)
        shard.require_listed(entry.bytes, entry.checksum)
        self._require_parts(shard, entry)
        self._require_rows(shard, entry)
        shard.checked = self._checked.setdefault(path, shard.checked)
        self._open[entry.file] = shard
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)

    def _require_parts(self, shard: Shard, entry: ShardEntry) -> None:
        """Raise CacheError if the shard's tensors differ from the manifest's: training would use wrong numbers."""
        once = entry == self.manifest.by_instruction
        expected = (self._instruction_layout if once else self._layout).parts
        found, hint = shard.layout.parts, "build the cache again in another folder"
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise CacheError(
                    f"{shard.path}: {name} is {found.get(name)}, but the manifest implies {expected.get(name)}", hint
                )
        if list(found) != list(expected):
            raise CacheError(f"{shard.path}: its tensors are not in the order that the format requires", hint)

    def _require_rows(self, shard: Shard, entry: ShardEntry) -> None:
        """Raise CacheError if the shard holds other rows than listed: two swapped files would each be valid."""
        if entry == self.manifest.by_instruction:
            expected = {"instruction": np.arange(len(self.manifest.instructions))}
        else:
            number = self.manifest.shards.index(entry)
            rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
            expected = {key: getattr(self.index, key)[rows] for key in INDEX_KEYS}
        for key, values in expected.items():
            if not np.array_equal(shard.array(key), values):
                raise CacheError(
                    f"{shard.path} holds other rows than the manifest lists: {key} differs", self.storage.repair
                )


_readers: weakref.WeakSet[CacheReader] = weakref.WeakSet()
"""Readers of this process, to reset after a fork."""


def _reset_readers() -> None:
    for reader in _readers:
        reader.reset_after_fork()


os.register_at_fork(after_in_child=_reset_readers)

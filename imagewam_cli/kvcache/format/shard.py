"""One shard: a safetensors file with what a codec stored of consecutive rows (docs/reference/cache-format.md).

row, episode, frame, instruction, variant   (N,) int64
checksum                           (N,) uint64    XXH3-64 of a row's bytes in every tensor below, in the file's order
valid                              (N, P) bool    absent where no layer holds text
layer.{i}.{part}                   (N, ...)       parts as the codec names them; i counts the kept layers

The first six follow the header; together they are the head of the file. The manifest has a checksum of the head, and
the head has one for every row. So every byte is covered, and a row can be verified when it is first read.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from imagewam_cli.errors import CacheError
from imagewam_cli.files import checksum_of, move_into_place, partial_of
from imagewam_cli.kvcache.format.buffers import ALIGNMENT, Bytes
from imagewam_cli.kvcache.format.manifest import repair_hint
from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.kvcache.format.row_copy import Copy, Rows, copy_rows, mapped_copy, plain_copy
from imagewam_cli.kvcache.format.row_layout import RowLayout

INDEX_KEYS = ("row", "episode", "frame", "instruction", "variant")
CHECKSUM = "checksum"
INDEX_BYTES = 8 * (len(INDEX_KEYS) + 1)
"""Bytes of the index per row."""

LoadMethod = Literal["mmap", "read"]
"""mmap: pages are loaded when touched and shared by processes. read: plain reads, faster on network file systems."""

_CHUNK_BYTES: dict[LoadMethod, int] = {"mmap": 2**21, "read": 2**24}
"""Bytes to copy before computing their checksums, while the CPU cache still holds them. For `read`, fewer system calls
matter more than cache locality."""
_DTYPES: dict[str, tuple[npt.DTypeLike, torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.uint16, torch.bfloat16),  # numpy has neither type: bytes are reinterpreted as the torch dtype
    "F8_E4M3": (np.uint8, torch.float8_e4m3fn),
    "I64": (np.int64, torch.int64),
    "U64": (np.uint64, torch.uint64),
    "I8": (np.int8, torch.int8),
    "U8": (np.uint8, torch.uint8),
    "BOOL": (np.bool_, torch.bool),
}
_COLUMNS = {**dict.fromkeys(INDEX_KEYS, Part((), torch.int64)), CHECKSUM: Part((), torch.uint64)}
_NAMES = {torch_type: name for name, (_, torch_type) in _DTYPES.items()}
_MAX_HEADER = 16 * 2**20


class ShardWriter:
    """Writes a shard batch by batch with the memory of one batch. The file appears only after `finish`, and is then
    complete."""

    def __init__(self, path: Path, rows: int, parts: Mapping[str, Part]) -> None:
        """rows: number of rows that will be appended. parts: the tensors after the index."""
        self.path, self.rows = path, rows
        self._temporary = partial_of(path)
        self._parts, self._written = RowLayout.from_parts(parts).parts, 0
        self._header, self._offsets, self.bytes = _header(self._parts, rows)
        self._columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file unless `finish` completed it."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, index: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
        """Append rows. index: the columns of `INDEX_KEYS`. tensors: named as in `parts`, on the CPU."""
        count = len(index["row"])
        if self._written + count > self.rows:
            raise self._other_count(f"more than {self.rows}")
        views = {name: _bytes_of(tensors[name], part, count) for name, part in self._parts.items()}
        for name, view in views.items():
            self._write(view.data, self._offsets[name] + self._written * view.shape[1])
        for name in INDEX_KEYS:
            self._columns[name] += index[name]
        self._columns[CHECKSUM] += row_checksums(list(views.values()), count)
        self._written += count

    def finish(self) -> str:
        """Make the file durable under its final name; return the checksum of its head."""
        if self._written != self.rows:
            raise self._other_count(str(self._written))
        columns = [np.array(self._columns[name], np.int64).tobytes() for name in INDEX_KEYS]
        head = b"".join([self._header, *columns, np.array(self._columns[CHECKSUM], np.uint64).tobytes()])
        self._write(memoryview(head), 0)
        os.fsync(self._file.fileno())
        self._file.close()
        move_into_place(self._temporary, self.path)
        return checksum_of(head)

    def _write(self, data: memoryview, at: int) -> None:
        """Write all data. Loops because one call writes at most 2 GB, and less if the disk is nearly full."""
        while data:
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written

    def _other_count(self, found: str) -> CacheError:
        return CacheError(
            f"{self.path.name} should have {self.rows} rows according to the dataset's metadata, but got {found}",
            "the dataset's metadata does not match its data; download or convert it again",
        )


@dataclass
class Shard:
    """An open shard. Rows are verified when first read."""

    path: Path
    method: LoadMethod
    views: dict[str, tuple[npt.NDArray[np.generic], torch.dtype]]
    """Arrays over a memory map of the file."""
    offsets: dict[str, int]
    """Offset of each array in the file."""
    mapped: Bytes
    """The whole file."""
    head_checksum: str
    """XXH3-128 of the header and the index."""
    repair: str
    """Hint for errors about damage."""
    checked: npt.NDArray[np.bool_] = field(init=False)
    """Flags of the verified rows, (N,). May be shared with the shard when it is opened again."""

    def __post_init__(self) -> None:
        self.checked = np.zeros(self.rows, np.bool_)

    @classmethod
    def open(cls, path: Path, method: LoadMethod = "mmap", repair: str | None = None) -> Shard:
        """Read the header and map the file. repair: hint for errors; by default the hint for a local cache.

        Raises:
            CacheError: the file is missing, or its header does not describe it.
        """
        repair = repair if repair is not None else repair_hint(path.parent.parent)
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    raise CacheError(f"{path} is damaged: its header claims {length} bytes of {size}", repair)
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is not a mapping")
            # as a plain array: a slice of a memmap costs ten times that of an array
            mapped, start = np.asarray(np.memmap(path, mode="r", dtype=np.uint8)), 8 + length
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            views = {name: _view(mapped, start, entry) for name, entry in entries.items()}
            counts = {len(array) for array, _ in views.values()}
            if len(counts) != 1 or any(name not in views for name in (*INDEX_KEYS, CHECKSUM)):
                raise ValueError("it lacks the tensors of a shard")
            head = mapped[: start + INDEX_BYTES * counts.pop()].tobytes()
            if {int(entries[name]["data_offsets"][1]) + start <= len(head) for name in _COLUMNS} != {True}:
                raise ValueError("its index does not follow its header")
            offsets = {name: start + int(entry["data_offsets"][0]) for name, entry in entries.items()}
            shard = cls(path, method, views, offsets, mapped, checksum_of(head), repair)
            shard._require_order(len(head))
            return shard
        except FileNotFoundError:
            raise CacheError(f"{path} is missing", repair) from None
        except KeyError as error:
            raise CacheError(
                f"{path} is damaged: its header lacks {error}, or has an unexpected value for it", repair
            ) from None
        except (ValueError, TypeError, IndexError, OverflowError, IsADirectoryError) as error:
            raise CacheError(f"{path} is damaged: {error}", repair) from None

    def _require_order(self, start: int) -> None:
        for name, part in self.layout.parts.items():
            if self.offsets[name] != start:
                raise ValueError(f"{name} begins at {self.offsets[name]}, but the preceding tensor ends at {start}")
            start += self.rows * part.row_bytes
        if not self.layout.aligned:
            raise ValueError("its tensors are not ordered by dtype, widest first")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.views[CHECKSUM][0])

    @functools.cached_property
    def layout(self) -> RowLayout:
        """Layout of the tensors after the index, in file order."""
        data_tensors = [name for name in self.views if name not in INDEX_KEYS and name != CHECKSUM]
        data_tensors.sort(key=lambda name: self.offsets[name])
        return RowLayout({name: Part(self.views[name][0].shape[1:], self.views[name][1]) for name in data_tensors})

    def require_listed(self, size: int, checksum: str) -> None:
        """Refuse a file that is not the one a manifest lists.

        Raises:
            CacheError: size or checksum differ; the message gives both values.
        """
        found = self.path.stat().st_size
        if found != size:
            raise CacheError(f"{self.path} has {found} bytes, but the manifest lists {size}", self.repair)
        if self.head_checksum != checksum:
            raise CacheError(
                f"{self.path} is damaged: the checksum of its head is {self.head_checksum[:16]}…, "
                f"the manifest says {checksum[:16]}…",
                self.repair,
            )

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return all rows of a tensor as a numpy array (bfloat16 as uint16, float8 as uint8)."""
        return self.views[name][0]

    def take(self, rows: Rows, into: Bytes, targets: Rows) -> None:
        """Copy rows to rows `targets` of memory allocated by `layout.blank`, verifying those not verified before.

        Raises:
            CacheError: rows are damaged; the message names their dataset rows.
        """
        fresh = ~self.checked[rows]
        try:
            found = copy_rows(
                functools.partial(self._copier, into),
                rows,
                into[:, : self.layout.bytes],
                targets,
                (~fresh).tolist(),
                _CHUNK_BYTES[self.method],
            )
        except EOFError as error:
            raise CacheError(f"{self.path} {error}", self.repair) from None
        read = rows[fresh]
        sound: npt.NDArray[np.bool_] = np.array(found, np.uint64)[fresh] == self.array(CHECKSUM)[read]
        self.checked[read[sound]] = True
        if not sound.all():
            numbers = ", ".join(str(self.array("row")[row]) for row in read[~sound][:5])
            raise CacheError(f"{self.path} is damaged: dataset rows {numbers} differ from their checksums", self.repair)

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Read the tensors of these rows, verified as in `take`."""
        taken = self.layout.blank(len(rows))
        self.take(rows, taken, np.arange(len(rows)))
        return self.layout.tensors(torch.from_numpy(taken))

    def damaged_rows(self) -> Rows:
        """Return the rows that differ from their checksums."""
        found = np.array(row_checksums([_flat(self.array(name)) for name in self.layout.parts], self.rows), np.uint64)
        return np.nonzero(found != self.array(CHECKSUM))[0].astype(np.int64)

    @contextmanager
    def _copier(self, into: Bytes) -> Iterator[Copy]:
        if self.method == "mmap":
            yield mapped_copy(self._blocks, into)
            return
        with open(self.path, "rb", buffering=0) as file:
            tensors = [(columns, self.offsets[name]) for name, columns in self.layout.slices.items()]
            yield plain_copy(file.fileno(), tensors, into)

    @functools.cached_property
    def _blocks(self) -> list[tuple[slice, Bytes]]:
        """Groups of tensors that one numpy copy can move: of equal size, and neighbors in both file and row."""
        blocks: list[tuple[slice, Bytes]] = []
        parts, slices = self.layout.parts, self.layout.slices
        for size, group in itertools.groupby(parts, key=lambda name: parts[name].row_bytes):
            names = list(group)
            begin, length = self.offsets[names[0]], len(names) * self.rows * size
            there = self.mapped[begin : begin + length].reshape(len(names), self.rows, size).swapaxes(0, 1)
            blocks.append((slice(slices[names[0]].start, slices[names[-1]].stop), there))
        return blocks


def row_checksums(parts: Sequence[Bytes], rows: int) -> list[int]:
    """Return XXH3-64 of each row's bytes, part after part.

    parts: (N, bytes) each, contiguous; empty if everything is stored per instruction.
    """
    sums = [xxhash.xxh3_64() for _ in range(rows)]
    for part in parts:
        view, size = part.reshape(-1).data, part.shape[1]
        for i, one in enumerate(sums):
            one.update(view[i * size : (i + 1) * size])
    return [one.intdigest() for one in sums]


def _header(parts: Mapping[str, Part], rows: int) -> tuple[bytes, dict[str, int], int]:
    """Return header bytes, offset of each tensor, and file size. parts: the tensors after the index."""
    entries, relative, at = {}, {}, 0
    for name, part in {**_COLUMNS, **parts}.items():
        end = at + rows * part.row_bytes
        entries[name] = {"dtype": _NAMES[part.dtype], "shape": [rows, *part.shape], "data_offsets": [at, end]}
        relative[name], at = at, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    head = 8 + len(text) + rows * INDEX_BYTES
    text += b" " * (-head % ALIGNMENT)  # so that the first tensor after the index begins at a multiple of it
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return len(text).to_bytes(8, "little") + text, offsets, start + at


def _bytes_of(tensor: Tensor, part: Part, rows: int) -> Bytes:
    if tuple(tensor.shape) != (rows, *part.shape) or tensor.dtype != part.dtype:
        raise ValueError(f"a tensor is {tensor.dtype} {tuple(tensor.shape)}, but {part} was declared for {rows} rows")
    return tensor.reshape(-1).view(torch.uint8).reshape(rows, part.row_bytes).numpy()


def _flat(array: npt.NDArray[np.generic]) -> Bytes:
    """Return the bytes of each row: (N, ...) -> (N, bytes)."""
    return array.reshape(len(array), prod(array.shape[1:])).view(np.uint8)


def _view(
    mapped: npt.NDArray[np.uint8], start: int, entry: dict[str, object]
) -> tuple[npt.NDArray[np.generic], torch.dtype]:
    numpy_type, torch_type = _DTYPES[str(entry["dtype"])]
    begin, end = (int(x) for x in entry["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(x) for x in entry["shape"])  # type: ignore[attr-defined]
    if not 0 <= begin <= end <= len(mapped) - start:
        raise ValueError(f"a tensor ends at {end}, the file at {len(mapped) - start}")
    return mapped[start + begin : start + end].view(numpy_type).reshape(shape), torch_type

"""Copy rows from a shard file into a batch and compute their checksums, on two threads for large batches.

The slow parts release the interpreter lock: numpy copies, and checksums of 64 KiB or more. The Python code between them
is kept minimal, because two threads that compete for the lock wait longer than they work.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import xxhash

from imagewam_cli.kvcache.format.buffers import Bytes

Rows = npt.NDArray[np.int64]
Run = tuple[int, int]
"""[begin, end) of rows that are neighbors both in the file and in the batch, so that a single copy moves them."""
Copy = Callable[[int, int, int], None]
"""(row, target, count): copy `count` rows, from row `row` of the file to row `target` of the batch."""

_TWO_THREADS_FROM = 2**22
"""Minimum number of bytes for which two threads are used. Waking a thread costs as much as copying a tenth of this."""
_PIECES = os.sysconf("SC_IOV_MAX")


def copy_rows(
    copier: Callable[[], AbstractContextManager[Copy]],
    rows: Rows,
    into: Bytes,
    targets: Rows,
    verified: Sequence[bool],
    chunk_bytes: int,
) -> list[int]:
    """Copy rows of a file to rows `targets` of `into`, (N, bytes).

    Args:
        copier: opens a `Copy` for each thread.
        verified: whether each row was verified before, so that its checksum is not computed.
        chunk_bytes: approximate number of bytes to copy before computing their checksums, while the CPU cache holds
            them.

    Returns:
        XXH3-64 of each row, 0 for verified ones.
    """
    if not len(rows):
        return []
    sums, sources, targets_list = [0] * len(rows), rows.tolist(), targets.tolist()
    chunks = deque(_chunks(_runs(rows, targets), _chunk_rows(len(rows), chunk_bytes // max(1, into.shape[1]))))

    def work() -> None:
        with copier() as copy:
            for chunk in _popped(chunks):
                for begin, end in chunk:
                    copy(sources[begin], targets_list[begin], end - begin)
                for i in range(chunk[0][0], chunk[-1][1]):
                    if not verified[i]:
                        sums[i] = xxhash.xxh3_64_intdigest(into[targets_list[i]])

    if into.shape[1] * len(rows) < _TWO_THREADS_FROM:
        work()
    else:
        # Both threads take chunks from one queue until it is empty, so neither waits for a slower one.
        other = _helper().submit(work)
        try:
            work()
        finally:
            chunks.clear()  # after an error, stop the helper early
            if not other.cancel():  # cancelled if the helper, busy with another reader, has not started
                other.result()
    return sums


def mapped_copy(blocks: Sequence[tuple[slice, Bytes]], into: Bytes) -> Copy:
    """Return a copy from a memory map. blocks: a slice of a row's bytes and its source, (N, tensors, bytes)."""
    pairs = [(into[:, columns].reshape(len(into), *there.shape[1:]), there) for columns, there in blocks]

    def copy(row: int, target: int, count: int) -> None:
        for here, there in pairs:
            here[target : target + count] = there[row : row + count]

    return copy


def plain_copy(file: int, tensors: Sequence[tuple[slice, int]], into: Bytes) -> Copy:
    """Return a copy by reads of an open file. tensors: a slice of a row's bytes and the offset of row 0 in the file.

    The copy raises EOFError if the file is too short.
    """
    memory, stride = memoryview(into).cast("B"), into.shape[1]  # type: ignore[arg-type]  # arrays are buffers

    def copy(row: int, target: int, count: int) -> None:
        begin, end = target * stride, (target + count) * stride
        for part, first in tensors:
            if size := part.stop - part.start:
                pieces = [memory[i : i + size] for i in range(begin + part.start, end, stride)]
                _fill(pieces, file, first + row * size)

    return copy


def _fill(pieces: list[memoryview], file: int, at: int) -> None:
    """Fill the pieces in order. Loops because one system call takes a limited number and reads at most 2 GB."""
    while pieces:
        count = os.preadv(file, pieces[:_PIECES], at)
        if not count:
            raise EOFError(f"ends before byte {at}")
        at += count
        full = 0
        while full < len(pieces) and count >= len(pieces[full]):
            count -= len(pieces[full])
            full += 1
        pieces = [pieces[full][count:], *pieces[full + 1 :]] if full < len(pieces) else []


def _runs(rows: Rows, targets: Rows) -> Iterator[Run]:
    breaks = np.nonzero((rows[1:] - rows[:-1] != 1) | (targets[1:] - targets[:-1] != 1))[0] + 1
    return itertools.pairwise([0, *breaks.tolist(), len(rows)])


def _chunk_rows(rows: int, most: int) -> int:
    """Return the chunk size in rows, so that both threads get equally many chunks of equal size."""
    turns = -(-rows // (2 * max(1, most)))
    return max(1, rows // (2 * turns))


def _chunks(runs: Iterator[Run], most: int) -> Iterator[list[Run]]:
    """Group runs into chunks of `most` rows, splitting runs where necessary."""
    chunk, free = list[Run](), most
    for begin, end in runs:
        while begin < end:
            cut = min(end, begin + free)
            chunk.append((begin, cut))
            begin, free = cut, free - (cut - begin)
            if not free:
                yield chunk
                chunk, free = [], most
    if chunk:
        yield chunk


def _popped(chunks: deque[list[Run]]) -> Iterator[list[Run]]:
    """Pop until the queue is empty; safe with several threads."""
    while chunks:
        try:
            yield chunks.popleft()
        except IndexError:  # the other thread was faster
            return


@functools.cache
def _helper() -> ThreadPoolExecutor:
    """Return the helper thread. It is kept, since starting a thread takes as long as reading some megabytes."""
    return ThreadPoolExecutor(1, "imagewam-rows")


os.register_at_fork(after_in_child=_helper.cache_clear)

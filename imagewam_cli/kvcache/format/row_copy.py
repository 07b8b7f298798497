"""Rows of a file into memory for them, and their checksums, piece by piece, on two threads where that is faster.

What takes long here runs without Python's lock: copies of many rows, and checksums of whole ones (xxhash lets go of it
from 64 KiB on). Between them stands as little as possible, since two threads that meet there wait for each other longer
than they work.
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
"""[begin, end) of rows to copy that are neighbours both where they come from and where they go to."""
Copy = Callable[[int, int, int], None]
"""(row, place, count): copies so many rows from this one on, to this place and those behind it."""

_SHARED = 2**22
"""From so many bytes on two threads copy: to wake one takes as long as to copy a tenth of it."""
_PIECES = os.sysconf("SC_IOV_MAX")


def transfer(
    copier: Callable[[], AbstractContextManager[Copy]],
    rows: Rows,
    into: Bytes,
    places: Rows,
    checked: Sequence[bool],
    at_once: int,
) -> list[int]:
    """Copy the rows to these places of `into`, (places, bytes); returns XXH3-64 of each that is not `checked`, 0 of the
    others. copier: gives each thread a `Copy`; at_once: bytes to copy before they go into checksums, about."""
    if not len(rows):
        return []
    sums, sources, targets = [0] * len(rows), rows.tolist(), places.tolist()
    shares = deque(_shares(_runs(rows, places), _share(len(rows), at_once // max(1, into.shape[1]))))

    def work() -> None:
        with copier() as copy:
            for share in _popped(shares):
                for begin, end in share:
                    copy(sources[begin], targets[begin], end - begin)
                for i in range(share[0][0], share[-1][1]):
                    if not checked[i]:
                        sums[i] = xxhash.xxh3_64_intdigest(into[targets[i]])

    if into.shape[1] * len(rows) < _SHARED:
        work()
    else:
        other = _helper().submit(work)
        try:
            work()
        finally:
            shares.clear()  # after an error the other has nothing more to do
            if not other.cancel():  # it had begun: not so where it is at work for another reader
                other.result()
    return sums


def mapped_copy(blocks: Sequence[tuple[slice, Bytes]], into: Bytes) -> Copy:
    """From a memory map. blocks: a place in a row's bytes, and what goes there of all rows, (N, tensors, bytes)."""
    pairs = [(into[:, place].reshape(len(into), *there.shape[1:]), there) for place, there in blocks]

    def copy(row: int, place: int, count: int) -> None:
        for here, there in pairs:
            here[place : place + count] = there[row : row + count]

    return copy


def plain_copy(file: int, tensors: Sequence[tuple[slice, int]], into: Bytes) -> Copy:
    """By reads of an open file. tensors: a place in a row's bytes, and where the file has the first row's.

    The copy raises EOFError where the file ends too soon.
    """
    memory, stride = memoryview(into).cast("B"), into.shape[1]  # type: ignore[arg-type]  # arrays are buffers

    def copy(row: int, place: int, count: int) -> None:
        begin, end = place * stride, (place + count) * stride
        for part, first in tensors:
            if size := part.stop - part.start:
                pieces = [memory[i : i + size] for i in range(begin + part.start, end, stride)]
                _fill(pieces, file, first + row * size)

    return copy


def _fill(pieces: list[memoryview], file: int, at: int) -> None:
    """All of them, one after the other: the system takes so many at once, and gives at most 2 GB."""
    while pieces:
        count = os.preadv(file, pieces[:_PIECES], at)
        if not count:
            raise EOFError(f"ends before its byte {at}")
        at += count
        full = 0
        while full < len(pieces) and count >= len(pieces[full]):
            count -= len(pieces[full])
            full += 1
        pieces = [pieces[full][count:], *pieces[full + 1 :]] if full < len(pieces) else []


def _runs(rows: Rows, places: Rows) -> Iterator[Run]:
    breaks = np.nonzero((rows[1:] - rows[:-1] != 1) | (places[1:] - places[:-1] != 1))[0] + 1
    return itertools.pairwise([0, *breaks.tolist(), len(rows)])


def _share(rows: int, most: int) -> int:
    """How many rows to take at a time: equally many, as often on each of two threads."""
    turns = -(-rows // (2 * max(1, most)))
    return max(1, rows // (2 * turns))


def _shares(runs: Iterator[Run], most: int) -> Iterator[list[Run]]:
    """Runs, cut where necessary, of so many rows together."""
    share, free = list[Run](), most
    for begin, end in runs:
        while begin < end:
            cut = min(end, begin + free)
            share.append((begin, cut))
            begin, free = cut, free - (cut - begin)
            if not free:
                yield share
                share, free = [], most
    if share:
        yield share


def _popped(shares: deque[list[Run]]) -> Iterator[list[Run]]:
    """Until there are none: threads may do so together."""
    while shares:
        try:
            yield shares.popleft()
        except IndexError:  # the other thread was faster
            return


@functools.cache
def _helper() -> ThreadPoolExecutor:
    """The second thread of this process: kept, since to start one takes as long as to read some megabytes."""
    return ThreadPoolExecutor(1, "imagewam-rows")


os.register_at_fork(after_in_child=_helper.cache_clear)

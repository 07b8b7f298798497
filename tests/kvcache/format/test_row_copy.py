"""Test `kvcache.format.row_copy`: each row is copied once with its checksum, by one thread or two."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import xxhash

from imagewam_cli.kvcache.format import row_copy as module
from imagewam_cli.kvcache.format.buffers import Bytes
from imagewam_cli.kvcache.format.row_copy import Copy, Rows, copy_rows, mapped_copy, plain_copy

COUNT, SIZES = 40, (6, 6, 6, 3)
PLACES = [slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 21)]


@pytest.fixture
def tensors() -> list[Bytes]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (COUNT, size), np.uint8) for size in SIZES]


@pytest.fixture
def rows_of(tensors: list[Bytes]) -> Bytes:
    return np.concatenate(tensors, 1)


@pytest.fixture(params=[1, 2**60], ids=["two threads", "one thread"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", request.param)


@pytest.fixture(params=["mapped", "plain"])
def copy_into(
    request: pytest.FixtureRequest, tensors: list[Bytes], tmp_path: Path
) -> Iterator[Callable[[Bytes], Copy]]:
    if request.param == "mapped":
        alike = np.stack(tensors[:3], 1)
        yield lambda into: mapped_copy([(slice(0, 18), alike), (PLACES[3], tensors[3][:, None])], into)
        return
    path = tmp_path / "tensors"
    path.write_bytes(b"head" + b"".join(t.tobytes() for t in tensors))
    firsts = 4 + COUNT * np.cumsum([0, *SIZES[:-1]])
    with path.open("rb") as file:
        yield lambda into: plain_copy(file.fileno(), list(zip(PLACES, firsts.tolist(), strict=True)), into)


def orders() -> list[Rows]:
    rng = np.random.default_rng(1)
    return [
        np.arange(COUNT),
        np.arange(COUNT)[::-1].copy(),
        np.array([5]),
        np.array([3, 3, 4, 5, 3]),
        np.sort(rng.permutation(COUNT)[:17]),
        rng.integers(0, COUNT, 33),
    ]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("at_once", [1, 100, 2**20])
@pytest.mark.parametrize("order", orders(), ids=len)
def test_every_row_is_copied_to_its_target_with_its_checksum(
    copy_into: Callable[[Bytes], Copy], rows_of: Bytes, order: Rows, at_once: int
) -> None:
    targets = np.random.default_rng(2).permutation(50)[: len(order)]
    for arranged in (np.sort(targets), targets):
        into = np.zeros((50, 24), np.uint8)
        checked = [i % 3 == 1 for i in range(len(order))]
        sums = copy_rows(
            lambda into=into: nullcontext(copy_into(into)), order, into[:, :21], arranged, checked, at_once
        )
        expected = np.zeros_like(into)
        expected[arranged, :21] = rows_of[order]
        np.testing.assert_array_equal(into, expected)
        digests = [xxhash.xxh3_64_intdigest(rows_of[row].tobytes()) for row in order]
        assert sums == [0 if known else digest for known, digest in zip(checked, digests, strict=True)]


def test_two_threads_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", 1)
    both = threading.Barrier(2, timeout=30)
    met = threading.local()

    def copy(row: int, target: int, count: int) -> None:
        # The barrier opens only if two different threads copy at the same time.
        if not hasattr(met, "other"):
            met.other = both.wait()

    copy_rows(lambda: nullcontext(copy), np.arange(8), np.zeros((8, 4), np.uint8), np.arange(8), [True] * 8, 1)


def test_a_busy_helper_thread_does_not_delay_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", 1)
    free, copied = threading.Event(), list[int]()
    busy = module._helper().submit(free.wait, 30)
    copy_rows(
        lambda: nullcontext(lambda row, target, count: copied.extend(range(row, row + count))),
        np.arange(8),
        np.zeros((8, 4), np.uint8),
        np.arange(8),
        [True] * 8,
        1,
    )
    assert copied == list(range(8))
    assert not busy.done()
    free.set()


def test_an_error_of_either_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", 1)
    main, both = threading.get_ident(), threading.Barrier(2, timeout=30)
    for fails_here in (True, False):

        @contextmanager
        def copier(fails_here: bool = fails_here) -> Iterator[Copy]:
            both.wait()  # both threads must have started before one of them fails
            if (threading.get_ident() == main) == fails_here:
                raise OSError("the disk is gone")
            yield lambda row, target, count: None

        with pytest.raises(OSError, match="the disk is gone"):
            copy_rows(copier, np.arange(8), np.zeros((8, 4), np.uint8), np.arange(8), [True] * 8, 1)


def test_a_forked_process_has_its_own_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", 1)
    module._helper().submit(int).result()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a helper thread inherited from the parent would never answer
        os._exit(0 if module._helper().submit(int).result() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_copying_stops_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWO_THREADS_FROM", 1)
    main, begun, copied = threading.get_ident(), threading.Event(), list[int]()

    def copy(row: int, target: int, count: int) -> None:
        if threading.get_ident() == main:
            begun.wait(30)
            raise OSError("the disk is gone")
        begun.set()
        time.sleep(0.1)
        copied.append(row)

    with pytest.raises(OSError, match="the disk is gone"):
        copy_rows(lambda: nullcontext(copy), np.arange(50), np.zeros((50, 4), np.uint8), np.arange(50), [True] * 50, 1)
    assert len(copied) <= 2
    module._helper().submit(int).result()  # wait until the helper thread has ended its copy
    assert len(copied) <= 2


def test_no_rows_and_rows_of_zero_bytes_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "empty").open("rb") as file:
        copy = plain_copy(file.fileno(), [(slice(0, 0), 0)], np.zeros((4, 8), np.uint8))
    nothing, four = np.zeros((4, 0), np.uint8), np.arange(4)
    assert copy_rows(lambda: nullcontext(copy), four[:0], nothing, four[:0], [], 1) == []
    sums = copy_rows(lambda: nullcontext(copy), four, nothing, four, [False] * 4, 1)
    assert sums == [xxhash.xxh3_64_intdigest(b"")] * 4


@pytest.mark.parametrize("given", [1, 7, 64])
def test_short_reads_are_continued(
    tmp_path: Path, tensors: list[Bytes], rows_of: Bytes, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    """A system call may read fewer bytes than requested, and accepts a limited number of pieces."""
    (tmp_path / "tensors").write_bytes(tensors[0].tobytes())
    real, asked = os.preadv, list[int]()

    def short(file: int, pieces: list[memoryview], at: int) -> int:
        asked.append(len(pieces))
        some = bytearray(min(given, sum(len(piece) for piece in pieces)))
        count, left = real(file, [some], at), memoryview(some)
        for piece in pieces:
            piece[: len(left)] = left[: len(piece)]
            left = left[len(piece) :]
        return count

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(module, "_PIECES", 9)
    into = np.zeros((COUNT, 8), np.uint8)
    with (tmp_path / "tensors").open("rb") as file:
        plain_copy(file.fileno(), [(PLACES[0], 0)], into)(0, 0, COUNT)
    np.testing.assert_array_equal(into[:, :6], rows_of[:, :6])
    assert max(asked) == 9


def test_a_file_that_ends_too_soon_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(20))
    with (tmp_path / "short").open("rb") as file, pytest.raises(EOFError, match="ends before byte 20"):
        plain_copy(file.fileno(), [(slice(0, 6), 0)], np.zeros((4, 8), np.uint8))(0, 0, 4)

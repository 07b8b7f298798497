"""Test `kvcache.format.buffers`: memory is reused once nothing refers to it, and never before."""

from __future__ import annotations

import gc

import numpy as np
import torch

from imagewam_cli.kvcache.format.buffers import Buffers


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_reused_when_nothing_refers_to_it() -> None:
    buffers = Buffers()
    first = buffers.empty(1000)
    where = address(first)
    del first
    again = buffers.empty(900)
    assert (address(again), len(again)) == (where, 900)


def test_memory_held_by_a_tensor_of_a_view_is_not_reused() -> None:
    buffers = Buffers()
    whole = buffers.empty(800)
    where = address(whole)
    tensor = torch.from_numpy(whole[80:160].view(np.float32).reshape(4, 5)).view(torch.int32)[1:3]
    tensor.fill_(7)
    del whole
    gc.collect()
    for _ in range(4):
        buffers.empty(800)[:] = 0
    assert tensor.tolist() == [[7] * 5] * 2
    del tensor
    held = [buffers.empty(800), buffers.empty(800)]
    assert where in {address(array) for array in held}


def test_few_buffers_are_kept_and_much_too_large_ones_are_not_reused() -> None:
    buffers = Buffers(kept=2)
    held = [buffers.empty(100) for _ in range(5)]
    held.clear()
    assert len(buffers._free) == 2
    assert len(buffers.empty(10).base) == 10  # type: ignore[arg-type]

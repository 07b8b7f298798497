"""`kvcache.buffers`: memory is given again when nobody can see it any more, and never before."""

from __future__ import annotations

import gc

import numpy as np
import torch

from imagewam_cli.kvcache.format.buffers import Buffers


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_that_nobody_holds_is_given_again() -> None:
    buffers = Buffers()
    first = buffers.empty(1000)
    place = address(first)
    del first
    again = buffers.empty(900)
    assert (address(again), len(again)) == (place, 900)


def test_memory_that_a_tensor_of_a_view_holds_is_not_given_again() -> None:
    buffers = Buffers()
    whole = buffers.empty(800)
    place = address(whole)
    tensor = torch.from_numpy(whole[80:160].view(np.float32).reshape(4, 5)).view(torch.int32)[1:3]
    tensor.fill_(7)
    del whole
    gc.collect()
    for _ in range(4):
        buffers.empty(800)[:] = 0
    assert tensor.tolist() == [[7] * 5] * 2
    del tensor
    held = [buffers.empty(800), buffers.empty(800)]
    assert place in {address(array) for array in held}


def test_no_more_waits_than_is_kept_and_much_too_large_is_not_used() -> None:
    buffers = Buffers(kept=2)
    held = [buffers.empty(100) for _ in range(5)]
    held.clear()
    assert len(buffers._free) == 2
    assert len(buffers.empty(10).base) == 10  # type: ignore[arg-type]

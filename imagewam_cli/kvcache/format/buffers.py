"""Reusable memory for batches of rows."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 64
"""Size of a cache line in bytes. Copies between aligned addresses are up to twice as fast."""


def aligned(size: int) -> Bytes:
    """Return `size` uninitialized bytes whose address is a multiple of `ALIGNMENT`."""
    whole = np.empty(size + ALIGNMENT, np.uint8)
    return whole[-whole.ctypes.data % ALIGNMENT :][:size]


class Buffers:
    """Pool of buffers. A buffer returns to the pool when no array or tensor refers to it any more.

    Reuse pays because the first write to a fresh page costs more than the copy itself. At most `kept` unused buffers
    are kept.
    """

    def __init__(self, kept: int = 2) -> None:
        self._kept = kept
        self._free: dict[int, Bytes] = {}
        """Free buffers by address. There is no lock: the garbage collector may call `_return` in the middle of a method
        of the same thread, which would deadlock. Every access is a single dict operation instead, which is atomic."""

    def empty(self, size: int) -> Bytes:
        """Return `size` uninitialized bytes."""
        owner = self._take(size)
        # Arrays and tensors created from `lent` must keep it alive, because the buffer returns to the pool when `lent`
        # is collected. A plain view would not: numpy's views of views refer to the owner of the memory. They stop at a
        # memoryview, hence `owner.data`.
        lent = np.frombuffer(owner.data, np.uint8)
        weakref.finalize(lent, self._return, owner).atexit = False
        return lent[:size]

    def _take(self, size: int) -> Bytes:
        for address, owner in list(self._free.items()):
            if size <= len(owner) <= 2 * size and self._free.pop(address, None) is not None:
                return owner
        return aligned(size)

    def _return(self, owner: Bytes) -> None:
        """Put a buffer back. Only the newest are kept, so sizes that are no longer used disappear."""
        self._free[owner.ctypes.data] = owner
        for address in list(self._free)[: -self._kept]:
            self._free.pop(address, None)

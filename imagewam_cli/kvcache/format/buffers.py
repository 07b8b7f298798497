"""Memory for rows that are read batch after batch."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 64
"""Bytes of a cache line. Between places that are multiples of it copies are up to twice as fast."""


def aligned(size: int) -> Bytes:
    """`size` bytes of any content, from a multiple of `ALIGNMENT` on."""
    whole = np.empty(size + ALIGNMENT, np.uint8)
    return whole[-whole.ctypes.data % ALIGNMENT :][:size]


class Buffers:
    """Gives memory, and has it back when nothing that was made of it is left: no array, no tensor.

    Pages that are new to a process cost more than the copy into them. At most `kept` buffers wait for their next use.
    """

    def __init__(self, kept: int = 2) -> None:
        self._kept = kept
        self._free: dict[int, Bytes] = {}
        """By their addresses. What is done to it is one step each: any thread may let go of memory at any time, in the
        midst of these methods too, so a lock would wait for itself."""

    def empty(self, size: int) -> Bytes:
        """`size` bytes of any content."""
        owner = self._fitting(size)
        # arrays and tensors made of `lent` refer to it and not to `owner`: numpy follows arrays to the owner of the
        # memory, but stops at another kind of object
        lent = np.frombuffer(owner.data, np.uint8)
        weakref.finalize(lent, self._back, owner).atexit = False
        return lent[:size]

    def _fitting(self, size: int) -> Bytes:
        for place, owner in list(self._free.items()):
            if size <= len(owner) <= 2 * size and self._free.pop(place, None) is not None:
                return owner
        return aligned(size)

    def _back(self, owner: Bytes) -> None:
        """Those that came back last are kept: a size that is asked for no more leaves."""
        self._free[owner.ctypes.data] = owner
        for place in list(self._free)[: -self._kept]:
            self._free.pop(place, None)

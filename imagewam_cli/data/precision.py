"""Choose the precision of recorded numbers: float32 where it loses nothing, else float64.

Datasets, caches and policies keep the same numbers, so the same choice is made everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import FloatArray


def compact(numbers: npt.NDArray[Any]) -> FloatArray:
    """Return a copy in float32 if that changes no number, else in float64."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    return rounded if np.array_equal(rounded, numbers) else numbers.astype(np.float64)

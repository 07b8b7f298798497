"""Look up the training targets of rows: states and action chunks, in robot units.

The trainer and `PrefixDataset` both build their batches here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.types import FloatArray
from imagewam_cli.kvcache.format.frame_table import FrameTable, Indices
from imagewam_cli.kvcache.reading.reader import RowIndex


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """state (B, S) and actions (B, T, A) as recorded; is_pad bool (B, T), True after the episode's end;
    row (B,) int64."""

    state: FloatArray
    actions: FloatArray
    is_pad: npt.NDArray[np.bool_]
    row: Indices
    """Rows of the dataset."""


def row_batch(table: FrameTable, index: RowIndex, rows: Indices, horizon: int) -> RowBatch:
    """Return state and the `horizon` actions that follow each row. rows: (B,) positions in `index`.

    Raises:
        CacheError: the table lacks an episode of these rows.
    """
    frames = zip(index.episode[rows].tolist(), index.frame[rows].tolist(), strict=True)
    chunks = [table.chunk(episode, frame, horizon) for episode, frame in frames]
    return RowBatch(
        state=table.state[index.row[rows]],
        actions=np.stack([chunk.actions for chunk in chunks]),
        is_pad=np.stack([chunk.is_pad for chunk in chunks]),
        row=index.row[rows],
    )

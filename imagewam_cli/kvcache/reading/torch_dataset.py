"""Read a cache with `torch.utils.data` in your own training loop, with workers and distributed ranks.

    dataset = PrefixDataset(folder, horizon=10)
    order = BatchOrder(dataset, batch=64)
    loader = DataLoader(dataset, sampler=order, batch_size=None, num_workers=2)

An item is a whole batch, since reading rows together is faster. Workers return encoded bytes, which are small;
`PrefixDataset.decode` turns them into float32 on the device that needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.format.frame_table import Indices
from imagewam_cli.kvcache.format.shard import LoadMethod
from imagewam_cli.kvcache.reading.epoch_order import BatchSchedule, Remainder, Shuffle
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.reading.row_batch import row_batch
from imagewam_cli.kvcache.storage.location import location
from imagewam_cli.prefix.kv import PrefixKV

STATE, ACTIONS, IS_PAD, ROW = "state", "actions", "is_pad", "row"


class PrefixDataset(Dataset[dict[str, Tensor]]):
    """Rows of a cache, numbered 0 .. len - 1. `dataset[rows]` reads an array of row numbers as one batch.

    Each DataLoader worker, forked or spawned, opens the cache itself.
    """

    def __init__(self, address: Path | str, *, horizon: int = 10, load: LoadMethod = "mmap") -> None:
        """address: folder or URL of the cache. horizon: number of actions in the chunk that follows each row.

        Raises:
            CacheError: there is no cache, it is damaged, or no shard is finished.
            UsageError: the horizon is below 1.
        """
        if horizon < 1:
            raise UsageError(f"horizon must be at least 1, got {horizon}", "use the number of actions per chunk")
        self.reader = CacheReader(location(address) if isinstance(address, str) else address, load)
        self.horizon = horizon

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, rows: Indices) -> dict[str, Tensor]:
        """Return K and V of these rows as stored, for `decode`, and

        state (B, S), actions (B, horizon, A) in robot units, float32, or float64 if the dataset records numbers that
        float32 rounds; is_pad bool (B, horizon), True after the episode's end; row int64 (B,), the dataset's.

        Raises:
            CacheError: rows are damaged; the message names them.
        """
        batch = row_batch(self.reader.table, self.reader.index, rows, self.horizon)
        return self.reader.gather(rows) | {
            STATE: torch.from_numpy(batch.state),
            ACTIONS: torch.from_numpy(batch.actions),
            IS_PAD: torch.from_numpy(batch.is_pad),
            ROW: torch.from_numpy(batch.row),
        }

    def decode(self, batch: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> PrefixKV:
        """Return float32 K and V of a batch, decoded on the device."""
        return self.reader.decode(batch, device=device)


class BatchOrder(Sampler[Indices]):
    """Sampler that yields the row numbers of each batch, for `DataLoader(..., sampler=order, batch_size=None)`.

    The order depends on (seed, epoch, rank) only, not on the number of workers. Over all ranks, each epoch has every
    row once, apart from what `remainder` repeats or leaves out.
    """

    def __init__(
        self,
        dataset: PrefixDataset,
        *,
        batch: int,
        rows: Indices | None = None,
        shuffle: Shuffle = "rows",
        shuffle_rows: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        remainder: Remainder = "pad",
    ) -> None:
        """
        Args:
            batch: rows per batch of this rank. The last batch of an epoch may have fewer; `drop` omits it.
            rows: rows to read; by default all.
            shuffle: `rows` shuffles all rows, `shards` a few shards at a time, `none` keeps the stored order.
            shuffle_rows: with `shards`, how many rows are shuffled together; by default those of four shards.
            rank, world_size: by default those of `torch.distributed` if it is initialized, else 0 of 1.
            remainder: what to do with rows that do not divide among the ranks. pad: repeat the first rows of the epoch,
                so that all ranks have equally many batches. drop: leave out rows and incomplete batches. uneven: read
                every row exactly once; some ranks have one row more.

        Raises:
            UsageError: a number is below 1, or there is no such rank.
            IndexError: the cache has fewer rows.
        """
        if batch < 1 or (shuffle_rows is not None and shuffle_rows < 1):
            raise UsageError("batch and shuffle_rows must be at least 1")
        self.rows = np.arange(len(dataset)) if rows is None else np.unique(rows)
        if len(self.rows) and not 0 <= self.rows[0] <= self.rows[-1] < len(dataset):
            raise IndexError(f"rows are numbered 0 to {len(dataset) - 1}")
        self.rank, self.world_size = _rank_of(rank, world_size)
        self.schedule = BatchSchedule(
            rows=self.rows,
            shard_rows=dataset.reader.shard_rows,
            batch=batch,
            shuffle=shuffle,
            shuffle_rows=shuffle_rows,
            seed=seed,
            rank=self.rank,
            world_size=self.world_size,
            remainder=remainder,
        )
        self.epoch, self._first = 0, 0

    def set_epoch(self, epoch: int, *, first_batch: int = 0) -> None:
        """Choose the epoch that the next loop reads, and the first batch to read, to resume in the middle of an
        epoch."""
        self.epoch, self._first = epoch, first_batch

    def __len__(self) -> int:
        """Return the number of batches of the next loop."""
        return max(0, self.schedule.batches_per_epoch - self._first)

    def __iter__(self) -> Iterator[Indices]:
        return self.schedule.epoch(self.epoch, self._first)


def _rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size, by default those of `torch.distributed`.

    Raises:
        UsageError: only one of them is given, or there is no such rank.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("rank and world_size belong together")
    if rank is None or world_size is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise UsageError(f"there is no rank {rank} of {world_size}", "ranks of N are 0 to N-1")
    return rank, world_size

"""Compute prefixes with an editor during training, without storing them.

Each step encodes its rows once, for all (noise, t) draws of a row. Pictures are decoded once, before the first step,
because videos are read from front to back while training rows are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch

from imagewam_cli.data.dataset_files import DatasetFiles
from imagewam_cli.data.formats import check_pictures
from imagewam_cli.data.pictures import PictureFile, picture_bytes
from imagewam_cli.data.types import Dataset, UInt8Image
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import DatasetError, UsageError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.building.build import dataset_entry
from imagewam_cli.kvcache.building.encoding import check_prefix, samples_bytes
from imagewam_cli.kvcache.format.frame_table import FrameTable, Indices
from imagewam_cli.kvcache.reading.reader import row_index
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.training.prefixes import SourceInfo

Pictures = Sequence[Mapping[str, UInt8Image]]
Watch = Callable[[int, int], AbstractContextManager[Callable[[int], object]]]
"""(rows, bytes) of the pictures about to be decoded -> context with a callback for progress in rows."""


@contextmanager
def _unwatched(rows: int, size: int) -> Iterator[Callable[[int], object]]:
    yield lambda count: None


class OnlinePrefixes:
    """A `PrefixSource` that encodes every `stride`-th frame of a dataset."""

    def __init__(
        self, dataset: Dataset, editor: Editor, *, stride: int = 1, batch: int = 16, watch: Watch = _unwatched
    ) -> None:
        """batch: rows per forward pass of the editor.

        Raises:
            UsageError: stride or batch is below 1.
        """
        if stride < 1 or batch < 1:
            raise UsageError("stride and the editor's batch must be at least 1")
        self.dataset, self.editor = dataset, editor
        self._stride, self._batch, self._watch = stride, batch, watch
        check_pictures(dataset)
        self.table, self._instructions = FrameTable.from_rows(dataset.rows(images=False))
        self.index = row_index(self.table, [e.index for e in dataset.episodes()], stride)
        self._files = DatasetFiles.of(dataset, editor.spec.cameras)
        self.info = SourceInfo(
            kind="online",
            location=str(dataset.info.root.resolve()),
            fingerprint=editor.fingerprint(),
            spec=editor.spec,
            codec="none",
            dataset=dataset_entry(dataset, editor.spec.cameras, stride, files=self._files),
            table_checksum=checksum_of(self.table.to_bytes()),
            rows=len(self.index.row),
            instructions=self._instructions,
        )
        self._pictures: PictureFile | None = None
        self._position = np.full(len(self.index.row), -1)
        """Position of each row in the file of pictures; -1 if it is not in the file."""

    @property
    def shard_rows(self) -> tuple[int, ...]:
        return (self.info.rows,)

    def dataset_files(self) -> DatasetFiles | None:
        return self._files

    def samples(self) -> bytes | None:
        return samples_bytes(self.dataset, self._stride)

    def scratch_bytes(self, rows: int) -> int:
        return rows * picture_bytes(self.dataset.info.cameras)

    @contextmanager
    def prepare(self, indices: Indices, folder: Path) -> Iterator[None]:
        """Decode the pictures of these rows into a temporary file, which is deleted at the end.

        Raises:
            RunError: the disk is too full for the pictures.
            DatasetError: a row's picture cannot be decoded or is missing.
        """
        wanted = np.unique(indices)
        self._pictures = PictureFile(folder, self.dataset.info.cameras, len(wanted))
        try:
            if len(wanted):
                self._decode(self._pictures, wanted)
            self._position[wanted] = np.arange(len(wanted))
            yield
        finally:
            self._position[:] = -1
            self._pictures.close()

    def begin_read(self, indices: Indices) -> Callable[[], PrefixKV]:
        """Read pictures now; the editor encodes them in the returned function."""
        positions = self._position[indices]
        if self._pictures is None or (positions < 0).any():
            raise RuntimeError("these rows were not passed to `prepare`")
        pictures = self._pictures.read(positions)
        instructions = [self._instructions[i] for i in self.index.instruction[indices]]
        return lambda: self._encoded(pictures, instructions)

    def _decode(self, pictures: PictureFile, wanted: Indices) -> None:
        missing = {int(row) for row in self.index.row[wanted]}
        episodes = np.unique(self.index.episode[wanted]).tolist()
        with self._watch(len(wanted), self.scratch_bytes(len(wanted))) as on_rows:
            for row in self.dataset.rows(episodes=episodes, stride=self._stride):
                if row.row in missing:
                    missing.remove(row.row)
                    pictures.add(row.images)
                    on_rows(1)
        if missing:
            raise DatasetError(
                f"{self.dataset.info.root}: row {min(missing)} has no picture",
                "the dataset's metadata and its rows do not belong together",
            )

    def _encoded(self, pictures: Pictures, instructions: Sequence[str]) -> PrefixKV:
        parts = [
            self._forward(pictures[i : i + self._batch], instructions[i : i + self._batch])
            for i in range(0, len(pictures), self._batch)
        ]
        layers = tuple(
            LayerKV(torch.cat([kv.k for kv in layer]), torch.cat([kv.v for kv in layer]))
            for layer in zip(*(part.layers for part in parts), strict=True)
        )
        valid = [part.valid for part in parts if part.valid is not None]
        return PrefixKV(layers, torch.cat(valid) if valid else None)

    def _forward(self, pictures: Pictures, instructions: Sequence[str]) -> PrefixKV:
        """Encode rows, in the form that a cache returns: float32, with `valid` if a layer holds text."""
        spec = self.editor.spec
        prefix = self.editor.encode(pictures, instructions)
        check_prefix(prefix, spec, len(pictures))
        here = prefix.to("cpu", torch.float32)
        if here.valid is None and spec.valid_tokens:
            return PrefixKV(here.layers, torch.ones(len(pictures), spec.valid_tokens, dtype=torch.bool))
        return here

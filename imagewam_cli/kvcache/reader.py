"""Reading a cache: random access to rows through memory maps. Knows nothing of training."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.editor import PrefixKV
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.codec import Codec
from imagewam_cli.kvcache.manifest import SHARDS, TABLE, Manifest, read_manifest
from imagewam_cli.kvcache.shard import INDEX_KEYS, Shard
from imagewam_cli.kvcache.table import FrameTable
from imagewam_cli.registry import Registry


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """Which dataset frame each cached row is: int64 (N,) each; `instruction` indexes the manifest's list."""

    row: npt.NDArray[np.int64]
    episode: npt.NDArray[np.int64]
    frame: npt.NDArray[np.int64]
    instruction: npt.NDArray[np.int64]


class CacheReader:
    """A cache folder, opened. `read(indices)` gives the prefix of any cached rows, numbered 0 .. len - 1 in build
    order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        if self.manifest.rows == 0:
            raise CacheError(f"{folder} has no finished shard yet", "run the same `imagewam cache` command again")
        self.codec: Codec = Registry.installed().codecs.load(self.manifest.codec)
        self._starts = np.cumsum([0] + [s.rows for s in self.manifest.shards])
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.manifest.rows

    @functools.cached_property
    def table(self) -> FrameTable:
        return FrameTable.load(self.folder / TABLE)

    @functools.cached_property
    def index(self) -> RowIndex:
        """Of all rows."""
        columns = {
            key: np.concatenate([self._shard(i).array(key) for i in range(len(self.manifest.shards))]).astype(np.int64)
            for key in INDEX_KEYS
        }
        return RowIndex(**columns)

    def read(self, indices: npt.NDArray[np.int64], *, device: torch.device | str = "cpu") -> PrefixKV:
        """The decoded prefix of the rows, float32, in the order of `indices`."""
        return self.decode(self.gather(indices), device=device)

    def gather(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """The rows' tensors as they are stored, by their names in the shards.

        Copies and nothing else, on one thread, so that it can run beside a computation without taking its processors.
        """
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        parts = [(self._shard(int(n)), np.nonzero(shard_of == n)[0], self._starts[n]) for n in np.unique(shard_of)]
        return {
            name: Shard.joined(name, [(shard, places, indices[places] - start) for shard, places, start in parts])
            for name in self._tensors(parts[0][0])
        }

    def decode(self, stored: dict[str, Tensor], *, device: torch.device | str = "cpu") -> PrefixKV:
        """float32 K and V of what `gather` returned."""
        moved = {name: tensor.to(device) for name, tensor in stored.items()}
        layers = tuple(
            LayerKV(self.codec.decode(moved[f"layer.{i}.k"]), self.codec.decode(moved[f"layer.{i}.v"]))
            for i in range(len(self.manifest.spec.layers))
        )
        return PrefixKV(layers, moved.get("valid"))

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            CacheError: names the first file that differs, with both checksums.
        """
        expected = {f"{SHARDS}/{s.file}": s.sha256 for s in self.manifest.shards} | {TABLE: self.manifest.table_sha256}
        for name, checksum in expected.items():
            path = self.folder / name
            if not path.exists():
                raise CacheError(f"{path} is missing", "run the same `imagewam cache` command again")
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != checksum:
                raise CacheError(
                    f"{path} is damaged: sha256 is {found[:16]}…, the manifest says {checksum[:16]}…",
                    "delete the file and run the same `imagewam cache` command again",
                )

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            entry = self.manifest.shards[number]
            shard = Shard.open(self.folder / SHARDS / entry.file)
            if shard.path.stat().st_size != entry.bytes:
                raise CacheError(
                    f"{shard.path} has {shard.path.stat().st_size} bytes, the manifest says {entry.bytes}",
                    "delete the file and run the same `imagewam cache` command again",
                )
            self._require_shapes(shard)
            self._open[number] = shard
        return self._open[number]

    def _require_shapes(self, shard: Shard) -> None:
        """K and V must be those that the manifest describes, or an expert of other heads would train on them."""
        for i, layer in enumerate(self.manifest.spec.layers):
            expected = (layer.tokens, layer.kv_heads, layer.head_dim)
            for name in (f"layer.{i}.k", f"layer.{i}.v"):
                found = shard.array(name).shape[1:] if name in shard else None
                if found != expected:
                    raise CacheError(
                        f"{shard.path}: {name} of {layer.name} is {found}, the manifest says {expected} "
                        "(tokens, heads, head size)",
                        "build the cache again in another folder",
                    )

    def _tensors(self, shard: Shard) -> list[str]:
        names = [f"layer.{i}.{part}" for i in range(len(self.manifest.spec.layers)) for part in "kv"]
        return names + (["valid"] if "valid" in shard else [])

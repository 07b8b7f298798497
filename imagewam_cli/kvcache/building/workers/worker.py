"""A worker of a distributed build: it loads the editor once, then writes the shards that it is assigned.

The engines, `processes` and `ray`, start workers and send each of them a `Job`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from imagewam_cli.data.dataset_files import DatasetFiles
from imagewam_cli.data.episodes import ALL_EPISODES, EpisodeSelection
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import ImagewamWarning
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.format.manifest import ShardEntry
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.prefix.spec import KVSpec
from imagewam_cli.registry import Registry


class Job(Protocol):
    """Everything that a worker needs to create its `ShardBuilder`, as plain data that can be pickled."""

    def open(self, slot: int) -> tuple[ShardBuilder, Sequence[str]]:
        """Return the builder, and the dataset's instructions in the order of the manifest. slot: the worker's index."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """A build from the command line. Paths are absolute, because workers may run in another folder."""

    dataset: Path
    keys: KeyMap
    editor: str
    prefix: PrefixOptions
    weights: Path | None
    hardware: Hardware
    out: Location
    codec: str
    settings: BuildSettings
    episodes: EpisodeSelection = ALL_EPISODES

    def open(self, slot: int) -> tuple[ShardBuilder, Sequence[str]]:
        registry = Registry.installed()
        dataset = open_dataset(self.dataset, self.keys, self.episodes)
        instructions = instructions_of(dataset)
        editor = load_editor(
            self.editor,
            self.prefix,
            instructions=instructions,
            weights=self.weights,
            hardware=_placed(self.hardware, slot, torch.cuda.device_count()),
        )
        return ShardBuilder(dataset, editor, self.out, registry.codecs.load(self.codec), self.settings), instructions


def _placed(hardware: Hardware, slot: int, devices: int) -> Hardware:
    """Return the hardware of one worker. `cuda` spreads workers over all GPUs; `cuda:1` puts all workers on one."""
    if hardware.device != "cuda" or not devices:
        return hardware
    return dataclasses.replace(hardware, device=f"cuda:{slot % devices}")


@dataclass(frozen=True, kw_only=True)
class WorkerIdentity:
    """Facts that must be equal for all workers of a build."""

    spec: KVSpec
    fingerprint: Mapping[str, object]
    dataset: str
    """Identity of the dataset."""
    warnings: tuple[str, ...] = ()
    """Warnings from loading, for the main process to repeat. They need not be equal."""
    content: str | None = None
    """Digest of the dataset's files; None if its format does not list them."""


class Worker:
    """One worker of a build. Creating it loads the editor.

    Raises:
        ImagewamError: the dataset cannot be opened, or the editor cannot be loaded.
    """

    def __init__(self, job: Job, slot: int, threads: int) -> None:
        """threads: number of torch's CPU threads. It can change the last bits of K and V."""
        torch.set_num_threads(threads)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ImagewamWarning)
            self._builder, self._instructions = job.open(slot)
        self._warnings = tuple(str(w.message) for w in seen if issubclass(w.category, ImagewamWarning))

    @property
    def facts(self) -> WorkerIdentity:
        builder = self._builder
        files = DatasetFiles.of(builder.dataset, builder.spec.cameras)
        return WorkerIdentity(
            spec=builder.spec,
            fingerprint=builder.fingerprint(),
            dataset=builder.dataset.info.identity,
            content=None if files is None else files.digest,
            warnings=self._warnings,
        )

    def make(self, names: Sequence[str], on_finished: Callable[[ShardEntry], None]) -> None:
        """Build the named shards, like `ShardBuilder.make`."""
        self._builder.make(names, self._instructions, on_finished=on_finished)

"""What a worker of any engine is: an editor, loaded once, that makes shards by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.format.manifest import ShardEntry
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.prefix.spec import KVSpec
from imagewam_cli.registry import Registry


class Recipe(Protocol):
    """How a worker gets its builder; plain data, since it is pickled into another process."""

    def open(self, slot: int) -> tuple[ShardBuilder, Sequence[str]]:
        """The builder, and the dataset's instructions as a manifest numbers them. slot: the worker's number."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildRecipe:
    """A build from the command line. Paths are absolute: workers may stand in other folders."""

    dataset: Path
    keys: KeyMap
    editor: str
    prefix: PrefixOptions
    weights: Path | None
    hardware: Hardware
    out: Location
    codec: str
    settings: BuildSettings

    def open(self, slot: int) -> tuple[ShardBuilder, Sequence[str]]:
        registry = Registry.installed()
        dataset = open_dataset(self.dataset, self.keys)
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
    """Workers on `cuda` take the devices in turn; one that is named is for all of them."""
    if hardware.device != "cuda" or not devices:
        return hardware
    return dataclasses.replace(hardware, device=f"cuda:{slot % devices}")


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a worker computes with, to be the same for all."""

    spec: KVSpec
    fingerprint: Mapping[str, Any]
    dataset: str
    """The dataset's identity."""


class Worker:
    """One of several. Loads the editor when it is made.

    Raises:
        ImagewamError: as opening the dataset and loading the editor do.
    """

    def __init__(self, recipe: Recipe, slot: int, threads: int) -> None:
        """threads: torch's, on the CPU; their number can show in the last bits of what the CPU computes."""
        torch.set_num_threads(threads)
        self._builder, self._instructions = recipe.open(slot)

    @property
    def facts(self) -> WorkerFacts:
        builder = self._builder
        identity = builder.dataset.info.identity
        return WorkerFacts(spec=builder.spec, fingerprint=builder.fingerprint(), dataset=identity)

    def make(self, names: Sequence[str], on_finished: Callable[[ShardEntry], None]) -> None:
        """As `ShardBuilder.make`."""
        self._builder.make(names, self._instructions, on_finished=on_finished)

"""Caches of the same demonstrations, for benchmarks that compare codecs."""

from __future__ import annotations

import argparse
from pathlib import Path

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.registry import Registry
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


def tiny_caches(arguments: argparse.Namespace, scratch: Path, episodes: int, settings: BuildSettings) -> list[Path]:
    """Build one cache with `tiny` per codec. arguments: codecs, size, weights."""
    record(TabletopEnvironment(), scratch / "dataset", episodes)
    dataset, installed = open_dataset(scratch / "dataset"), Registry.installed()
    size = (arguments.size, arguments.size) if arguments.size else None
    editor = load_editor(
        "tiny",
        PrefixOptions(cameras=tuple(dataset.info.cameras), image_size=size),
        instructions=instructions_of(dataset),
        weights=arguments.weights,
    )
    for codec in arguments.codecs:
        build_cache(dataset, editor, scratch / codec, installed.codecs.load(codec), settings)
    return [scratch / codec for codec in arguments.codecs]

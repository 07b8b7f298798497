"""Options that `imagewam cache` and `imagewam cache plan` share, besides those of the editor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.help import ADVANCED, COMPUTE, KEEP, OUTPUT
from imagewam_cli.cli.options import require_at_least_one, require_positive
from imagewam_cli.cli.part import assigned_part
from imagewam_cli.workspace import CACHES

if TYPE_CHECKING:
    from imagewam_cli.cli.editor_options import EditorSetup
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings
    from imagewam_cli.kvcache.storage.location import Location

CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        "--dtype",
        metavar="NAME",
        help="How K and V are stored: fp32, bf16, fp16, fp8, int8, int4, pca2, pca1, pca0.5 or a plugin's codec.",
        rich_help_panel=KEEP,
    ),
]
BatchOption = Annotated[
    int, typer.Option("--batch", metavar="N", help="Rows per forward pass.", rich_help_panel=COMPUTE)
]
ShardMbOption = Annotated[
    float, typer.Option("--shard-mb", metavar="MB", help="Approximate size of a shard.", rich_help_panel=OUTPUT)
]
VariantsOption = Annotated[
    int,
    typer.Option(
        "--variants",
        metavar="N",
        help="Versions of each row: the recorded pictures and N - 1 augmented copies.",
        rich_help_panel=ADVANCED,
    ),
]
CacheOutOption = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="FOLDER|URL",
        help="The cache, such as s3://bucket/mine; by default caches/EDITOR-DATASET.",
        rich_help_panel=OUTPUT,
    ),
]


def cache_location(out: str | None, chosen: EditorSetup) -> Location:
    """Return the folder or URL that --out names, by default caches/EDITOR-DATASET."""
    from imagewam_cli.kvcache.storage.location import location

    return location(out) if out is not None else CACHES / chosen.name


def build_settings(*, stride: int, batch: int, shard_mb: float, variants: int, part: str | None) -> BuildSettings:
    """Return the settings of a build.

    Raises:
        UsageError: a number is out of range, or the part does not exist.
    """
    from imagewam_cli.data.augmentation import Augmentation
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings

    require_at_least_one(stride=stride, batch=batch, variants=variants)
    require_positive(shard_mb=shard_mb)
    return BuildSettings(
        stride=stride,
        augmentation=Augmentation(variants=variants),
        batch=batch,
        shard_mb=shard_mb,
        part=assigned_part(part, os.environ),
    )

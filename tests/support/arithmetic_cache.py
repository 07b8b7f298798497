"""Build the cache that most cache tests use: five short episodes, encoded by an editor that only does arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32, CastCodec
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset

LENGTHS = (5, 9, 4, 1, 7)
"""Number of frames in each episode."""

SETTINGS = BuildSettings(stride=2, batch=3, shard_mb=0.009)
"""Rows take 1596 bytes, so a shard of 9000 bytes holds five. The episodes have 3, 5, 2, 1 and 4 rows."""

CUT = ((0,), (1,), (2, 3), (4,))
"""Episodes in each shard with SETTINGS. The shards have 3 | 5 | 2 + 1 | 4 rows."""


def build(
    out: str | Path,
    *,
    dataset: MemoryDataset | None = None,
    editor: ArithmeticEditor | None = None,
    codec: CastCodec = FLOAT32,
    on_rows: Callable[[int], None] = lambda rows: None,
    **settings: Any,
) -> ArithmeticEditor:
    """Build the cache at `out` and return the editor, which counts what it encoded.

    `settings` replace fields of SETTINGS.
    """
    editor = editor or ArithmeticEditor()
    chosen = dataclasses.replace(SETTINGS, **settings)
    build_cache(dataset or MemoryDataset(LENGTHS), editor, out, codec, chosen, on_rows=on_rows)
    return editor

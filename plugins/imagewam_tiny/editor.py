"""Loads the embedded weights through the FLUX.2 editor class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from imagewam_cli.editor import PrefixSettings
from imagewam_cli.hookspecs import EditorEntry
from imagewam_flux2.editor import DEFAULTS as KLEIN
from imagewam_flux2.editor import Flux2Editor
from imagewam_tiny import recipe

WEIGHTS = Path(__file__).with_name("weights")

DEFAULTS = dataclasses.replace(
    KLEIN,
    timestep=recipe.PREFIX_TIMESTEP,
    text_padding="trim",
    compute_dtype="float32",
    camera_size=(recipe.IMAGE_SIZE, recipe.IMAGE_SIZE),
    text_layers=recipe.TEXT_LAYERS,
    max_text_tokens=recipe.MAX_TEXT_TOKENS,
)
"""Timestep and padding are those that `tiny` was trained with; every other timestep is off its distribution."""


def load(
    entry: EditorEntry,
    settings: PrefixSettings,
    *,
    instructions: Sequence[str],
    weights: Path | None = None,
    device: str = "cpu",
) -> Flux2Editor:
    """An `imagewam_cli.editor.EditorLoader`; `weights` replaces the embedded folder."""
    return Flux2Editor(entry, settings, DEFAULTS, weights or WEIGHTS, instructions=instructions, device=device)

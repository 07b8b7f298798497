"""Loads the embedded weights through the FLUX.2 editor class."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from imagewam_flux2.editor import Flux2Editor
from imagewam_tiny import recipe

WEIGHTS = Path(__file__).with_name("weights")


class TinyEditor(Flux2Editor):
    """Timestep and padding are those that `tiny` was trained with; every other timestep is off its distribution.

    So are other forwards: in training text and reference never saw a target, and there was one picture. Hence mode
    `prefix` and tiled cameras alone.
    """

    embedded = WEIGHTS
    defaults = dataclasses.replace(
        Flux2Editor.defaults,
        modes={"prefix": dataclasses.replace(Flux2Editor.defaults.modes["prefix"], timestep=recipe.PREFIX_TIMESTEP)},
        text_padding="trim",
        compute_dtype="float32",
        camera_size=(recipe.IMAGE_SIZE, recipe.IMAGE_SIZE),
        camera_layouts=("tile", "head-over-wrists"),
        text_layers=recipe.TEXT_LAYERS,
        max_text_tokens=recipe.MAX_TEXT_TOKENS,
    )

"""The FLUX.2 editor class with the embedded weights."""

from __future__ import annotations

from pathlib import Path

from imagewam_flux2.editor import Flux2Editor
from imagewam_tiny import architecture

WEIGHTS = Path(__file__).with_name("weights")


class TinyEditor(Flux2Editor):
    """FLUX.2's editor with the weights that ship with the plugin."""

    embedded = WEIGHTS
    text_layers = architecture.TEXT_LAYERS

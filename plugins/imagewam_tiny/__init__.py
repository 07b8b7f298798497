"""Entry of `tiny`, the embedded editor: a trained miniature of FLUX.2-klein for 128-pixel tabletop pictures.

Its folder `weights/` is an ordinary diffusers pipeline, loaded by the same class as FLUX.2-klein. It is
written by `imagewam_tiny.train`.
"""

from __future__ import annotations

import dataclasses

from imagewam_cli.plugin import EditorEntry, ModeDefaults, hookimpl
from imagewam_flux2 import DEFAULTS, components
from imagewam_tiny import architecture

_DEFAULTS = dataclasses.replace(
    DEFAULTS,
    modes={"prefix": ModeDefaults(timestep=architecture.PREFIX_TIMESTEP, segments=("text", "reference"))},
    text_paddings=("trim", "keep"),
    compute_dtype="float32",
    camera_size=(architecture.IMAGE_SIZE, architecture.IMAGE_SIZE),
    camera_layouts=("tile", "head-over-wrists"),
    max_text_tokens=architecture.MAX_TEXT_TOKENS,
)
"""Settings that tiny was trained with. In training, the prefix had one timestep, text and reference never attended to a
target, and there was one reference picture. So there is no mode `denoise`, and no layout `separate`."""


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="tiny",
            summary="embedded miniature of FLUX.2-klein, trained on tabletop edits",
            load="imagewam_tiny.editor:TinyEditor",
            family="Flux2KleinPipeline",
            defaults=_DEFAULTS,
            components=components(4_190_720, 499_776, vae=854_508),
            license="Apache-2.0",
            gated=False,
            gated_source="the weights are part of the plugin",
        )
    ]

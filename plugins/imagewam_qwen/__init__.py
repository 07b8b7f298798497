"""Entries of the Qwen-Image-Edit editors. The code is in `editor`."""

from __future__ import annotations

import dataclasses

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl

_COMPONENTS = {
    "transformer": Component("diffusers:QwenImageTransformer2DModel", 20_430_401_088),
    "vae": Component("diffusers:AutoencoderKLQwenImage", 126_892_531),
    "text_encoder": Component("transformers:Qwen2_5_VLForConditionalGeneration", 8_292_166_656),
    "processor": Component("imagewam_qwen.processor:PictureProcessor"),
}
_SIZES = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}
PIXELS_PER_TOKEN = 16
_DEFAULTS = EditorDefaults(
    modes={
        "prefix": ModeDefaults(timestep=1.0, segments=("text", "reference")),
        "denoise": ModeDefaults(timestep=1.0, segments=("text", "target", "reference")),
    },
    text_paddings=("trim",),  # the pipelines mask padding
    camera_size=(1024, 1024),
    size_multiple=PIXELS_PER_TOKEN,
    max_text_tokens=None,  # the pipelines document a limit of 1024 but truncate nothing
)
"""Defaults of Qwen-Image-Edit; `editor` gives the reasons."""
_PLUS_DEFAULTS = dataclasses.replace(_DEFAULTS, camera_layouts=("tile", "separate"))


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="qwen-image-edit",
            summary="Qwen-Image-Edit, one picture",
            load="imagewam_qwen.editor:QwenEditor",
            family="QwenImageEditPipeline",
            defaults=_DEFAULTS,
            components=_COMPONENTS,
            config=_SIZES,
            repo="Qwen/Qwen-Image-Edit",
            license="Apache-2.0",
            gated=False,
            gated_source="the repository's page",
        ),
        *(
            EditorEntry(
                name=name,
                summary=f"Qwen-Image-Edit-{month}, one picture or one per camera",
                load="imagewam_qwen.editor:QwenPlusEditor",
                family="QwenImageEditPlusPipeline",
                defaults=_PLUS_DEFAULTS,
                components=_COMPONENTS,
                config={**_SIZES, "zero_cond_t": clean_references},
                repo=f"Qwen/Qwen-Image-Edit-{month}",
                license="Apache-2.0",
            )
            for name, month, clean_references in (
                ("qwen-image-edit-plus", 2509, False),
                ("qwen-image-edit-2511", 2511, True),
            )
        ),
    ]

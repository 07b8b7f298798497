"""Entry of the FLUX.1-Kontext editor. The code is in `editor`."""

from __future__ import annotations

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl

_DEFAULTS = EditorDefaults(
    modes={
        "prefix": ModeDefaults(timestep=1.0, segments=("text", "reference")),
        "denoise": ModeDefaults(timestep=1.0, segments=("text", "target", "reference"), kept=("text", "reference")),
    },
    camera_size=(512, 512),
    size_multiple=16,
    max_text_tokens=512,
)
"""`imagewam_cli.editors.joint` gives the reasons."""


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="flux-kontext",
            summary="FLUX.1 Kontext [dev], guidance-distilled",
            load="imagewam_flux_kontext.editor:FluxKontextEditor",
            family="FluxKontextPipeline",
            defaults=_DEFAULTS,
            components={
                "transformer": Component("diffusers:FluxTransformer2DModel", 11_901_408_320),
                "vae": Component("diffusers:AutoencoderKL", 83_819_683),
                "text_encoder": Component("transformers:CLIPTextModel", 123_060_480),
                "text_encoder_2": Component("transformers:T5EncoderModel", 4_762_310_656),
                "tokenizer": Component("transformers:CLIPTokenizer"),
                "tokenizer_2": Component("transformers:T5TokenizerFast"),
            },
            config={"guidance_embeds": True},
            repo="black-forest-labs/FLUX.1-Kontext-dev",
            gated=True,
            gated_source="the repository's page",
            license="FLUX.1 [dev] non-commercial",
        )
    ]

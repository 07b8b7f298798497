"""FLUX.1-Kontext as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="flux-kontext",
            summary="FLUX.1 Kontext [dev], guidance-distilled",
            load="imagewam_flux_kontext.editor:FluxKontextEditor",
            family="FluxKontextPipeline",
            components={
                "transformer": 11_901_408_320,
                "vae": 83_819_683,
                "text_encoder": 123_060_480,
                "text_encoder_2": 4_762_310_656,
                "tokenizer": 0,
                "tokenizer_2": 0,
            },
            config={"guidance_embeds": True},
            modes=("prefix", "denoise"),
            repo="black-forest-labs/FLUX.1-Kontext-dev",
            gated=True,
            gated_source="the repository's page",
            license="FLUX.1 [dev] non-commercial",
        )
    ]

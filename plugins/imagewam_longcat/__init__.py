"""LongCat-Image-Edit as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="longcat-image-edit",
            summary="LongCat-Image-Edit, whose text encoder sees the picture",
            load="imagewam_longcat.editor:LongCatEditor",
            family="LongCatImageEditPipeline",
            components={
                "transformer": 6_270_668_864,
                "vae": 83_819_683,
                "text_encoder": 8_292_166_656,
                "tokenizer": 0,
                "text_processor": 0,
            },
            config={"num_layers": 10, "num_single_layers": 20},
            modes=("prefix", "denoise"),
            repo="meituan-longcat/LongCat-Image-Edit",
            gated=False,
            gated_source="the repository's page",
            license="Apache-2.0",
        )
    ]

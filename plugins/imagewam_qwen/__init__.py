"""Qwen-Image-Edit as imagewam editors. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl

_COMPONENTS = {"transformer": 20_430_401_088, "vae": 126_892_531, "text_encoder": 8_292_166_656, "processor": 0}
_SIZES = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="qwen-image-edit",
            summary="Qwen-Image-Edit, one picture",
            load="imagewam_qwen.editor:QwenEditor",
            family="QwenImageEditPipeline",
            components=_COMPONENTS,
            config=_SIZES,
            modes=("prefix", "denoise"),
            repo="Qwen/Qwen-Image-Edit",
            license="Apache-2.0",
            gated=False,
            gated_source="the repository's page",
        ),
        *(
            EditorEntry(
                name=name,
                summary=f"Qwen-Image-Edit-{month}, one picture for each camera if wanted",
                load="imagewam_qwen.editor:QwenPlusEditor",
                family="QwenImageEditPlusPipeline",
                components=_COMPONENTS,
                config={**_SIZES, "zero_cond_t": clean_references},
                modes=("prefix", "denoise"),
                repo=f"Qwen/Qwen-Image-Edit-{month}",
                license="Apache-2.0",
            )
            for name, month, clean_references in (
                ("qwen-image-edit-plus", 2509, False),
                ("qwen-image-edit-2511", 2511, True),
            )
        ),
    ]

"""Lucy Edit as an imagewam editor. Every `imagewam` command imports this module, so it imports no torch."""

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="lucy-edit",
            summary="Lucy Edit, a video editor on Wan 2.2 5B, shown one frame",
            load="imagewam_template.editor:LucyEditor",
            family="LucyEditPipeline",
            components={
                "transformer": Component("diffusers:WanTransformer3DModel", parameters=5_000_377_536),
                "vae": Component("diffusers:AutoencoderKLWan", parameters=704_688_668),
                "text_encoder": Component("transformers:UMT5EncoderModel", parameters=5_680_910_336),
                "tokenizer": Component("transformers:AutoTokenizer"),
            },
            config={
                "num_layers": 30,
                "num_attention_heads": 24,
                "ffn_dim": 14336,
                "in_channels": 96,
                "out_channels": 48,
            },
            defaults=EditorDefaults(
                modes={"denoise": ModeDefaults(timestep=1.0, segments=("target",))},
                text_paddings=("keep",),  # the cross-attention takes no mask, so padding cannot be hidden
                camera_size=(480, 480),
                size_multiple=32,
                max_text_tokens=512,
            ),
            repo="decart-ai/Lucy-Edit-Dev",
            license="Lucy Edit non-commercial",
        )
    ]

"""Lucy Edit as an imagewam editor. Every `imagewam` command imports this: no torch here, only what there is."""

from imagewam_cli.hookspecs import EditorEntry, hookimpl

PARTS = {"transformer": 5_000_377_536, "vae": 704_688_668, "text_encoder": 5_680_910_336, "tokenizer": 0}
SIZES = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336}
CHANNELS = {"in_channels": 96, "out_channels": 48, "text_dim": 4096}


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="lucy-edit",
            summary="Lucy Edit, a video editor on Wan 2.2 5B, shown one frame",
            load="imagewam_template.editor:LucyEditor",
            family="LucyEditPipeline",
            components=PARTS,
            config=SIZES | CHANNELS,
            modes=("denoise",),
            repo="decart-ai/Lucy-Edit-Dev",
            license="Lucy Edit non-commercial",
        )
    ]

"""InstructPix2Pix as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion 1.5",
            load="imagewam_instruct_pix2pix.editor:InstructPix2PixEditor",
            family="StableDiffusionInstructPix2PixPipeline",
            components={
                "unet": 859_532_484,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "tokenizer": 0,
                "scheduler": 0,
            },
            denoiser="unet",
            config={"sample_size": 64, "in_channels": 8, "cross_attention_dim": 768},
            modes=("denoise",),
            repo="timbrooks/instruct-pix2pix",
            license="MIT",
        )
    ]

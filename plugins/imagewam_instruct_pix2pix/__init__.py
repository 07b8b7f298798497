"""InstructPix2Pix as imagewam editors, on Stable Diffusion 1.5 and on SDXL. See `editor` and `sdxl` for the code; this
module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl

_SDXL = {
    "sample_size": 128,
    "in_channels": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


_SHARED = {"vae": 83_653_863, "text_encoder": 123_060_480, "tokenizer": 0, "scheduler": 0}
"""Components that both have, with as many parameters."""


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion 1.5",
            load="imagewam_instruct_pix2pix.editor:InstructPix2PixEditor",
            family="StableDiffusionInstructPix2PixPipeline",
            components={"unet": 859_532_484, **_SHARED},
            denoiser="unet",
            config={"sample_size": 64, "in_channels": 8, "cross_attention_dim": 768},
            modes=("denoise",),
            repo="timbrooks/instruct-pix2pix",
            license="MIT",
        ),
        EditorEntry(
            name="sdxl-instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion XL",
            load="imagewam_instruct_pix2pix.sdxl:SdxlInstructPix2PixEditor",
            family="StableDiffusionXLInstructPix2PixPipeline",
            components={"unet": 2_567_475_204, **_SHARED, "text_encoder_2": 694_659_840, "tokenizer_2": 0},
            denoiser="unet",
            config=_SDXL,
            modes=("denoise",),
            repo="diffusers/sdxl-instructpix2pix-768",
            license="OpenRAIL++-M",
        ),
    ]

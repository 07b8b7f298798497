"""Entries of the InstructPix2Pix editors on Stable Diffusion 1.5 and SDXL. The code is in `editor` and `sdxl`."""

from __future__ import annotations

import dataclasses

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl

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


_SHARED = {
    "vae": Component("diffusers:AutoencoderKL", 83_653_863),
    "text_encoder": Component("transformers:CLIPTextModel", 123_060_480),
    "tokenizer": Component("transformers:CLIPTokenizer"),
    # only its noise levels are used, so the class does not depend on the folder's sampler
    "scheduler": Component("diffusers:DDPMScheduler"),
}
"""Components that both editors have."""
_SECOND_ENCODER = {
    "text_encoder_2": Component("transformers:CLIPTextModelWithProjection", 694_659_840),
    "tokenizer_2": Component("transformers:CLIPTokenizer"),
}
PIXELS_PER_LATENT = 8
_DEFAULTS = EditorDefaults(
    modes={"denoise": ModeDefaults(timestep=1.0, segments=("text", "target"), kept=("target",))},
    compute_dtype="float16",
    camera_size=(256, 256),
    size_multiple=PIXELS_PER_LATENT,
    max_text_tokens=77,
)


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion 1.5",
            load="imagewam_instruct_pix2pix.editor:InstructPix2PixEditor",
            family="StableDiffusionInstructPix2PixPipeline",
            defaults=_DEFAULTS,
            components={"unet": Component("diffusers:UNet2DConditionModel", 859_532_484), **_SHARED},
            denoiser="unet",
            config={"sample_size": 64, "in_channels": 8, "cross_attention_dim": 768},
            repo="timbrooks/instruct-pix2pix",
            license="MIT",
        ),
        EditorEntry(
            name="sdxl-instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion XL",
            load="imagewam_instruct_pix2pix.sdxl:SdxlInstructPix2PixEditor",
            family="StableDiffusionXLInstructPix2PixPipeline",
            defaults=dataclasses.replace(_DEFAULTS, camera_size=(768, 768)),
            components={
                "unet": Component("diffusers:UNet2DConditionModel", 2_567_475_204),
                **_SHARED,
                **_SECOND_ENCODER,
            },
            denoiser="unet",
            config=_SDXL,
            repo="diffusers/sdxl-instructpix2pix-768",
            license="OpenRAIL++-M",
        ),
    ]

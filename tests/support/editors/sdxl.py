"""Create a tiny StableDiffusionXLInstructPix2PixPipeline folder with SDXL's structure.

A block without attention comes first, then blocks with one and two transformer layers, with two and four heads. The two
text encoders have different widths.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLInstructPix2PixPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.support.editors.instruct_pix2pix import byte_tokenizer, small_vae, text_config

POOLED, TIME_EMBEDDING = 20, 8


def build(path: Path) -> Path:
    """Write the pipeline to `path`, with the same weights every time and the released sampler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionXLInstructPix2PixPipeline(
            unet=small_unet(),
            vae=small_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(text_config()),
            text_encoder_2=CLIPTextModelWithProjection(
                text_config(hidden_size=16, projection_dim=POOLED, num_hidden_layers=3, hidden_act="gelu")
            ),
            tokenizer=byte_tokenizer(),
            tokenizer_2=byte_tokenizer(pad_token="!"),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )
    pipeline.save_pretrained(path)
    return path


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=24 + 16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBEDDING,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_EMBEDDING,
        norm_num_groups=4,
    )

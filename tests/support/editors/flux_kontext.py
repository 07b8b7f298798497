"""Create a complete FLUX.1-Kontext pipeline folder with about 170,000 random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

AXES = (4, 6, 6)


def build(path: Path) -> Path:
    """Write a pipeline with two double blocks, one single block, 2 heads of 16, and a scheduler without a shift."""
    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = FluxKontextPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=1,
                attention_head_dim=sum(AXES),
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=20,
                guidance_embeds=True,
                axes_dims_rope=AXES,
            ),
            vae=flux_vae(),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=514,
                    hidden_size=20,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=16,
                    bos_token_id=512,
                    eos_token_id=513,
                    pad_token_id=513,
                )
            ),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
            ),
            tokenizer=clip_tokenizer(path),
            tokenizer_2=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    pipeline.save_pretrained(path)
    return path


def flux_vae() -> AutoencoderKL:
    """Create a small FLUX.1 VAE: latents with 4 channels at 1/8 of the image size, shifted and scaled."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Create a tokenizer of single bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "clip-vocab.json", folder / "clip-merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)
    vocabulary.unlink()
    merges.unlink()
    return tokenizer


def t5_tokenizer() -> T5TokenizerFast:
    """Create a tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=512)

"""Write a LucyEditPipeline folder with a few hundred thousand random weights, for tests and to try out the plugin.

python -m imagewam_template.tiny FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, LucyEditPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

LATENTS, STATES = 4, 24


def build(folder: Path) -> Path:
    """Write the pipeline to `folder`, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = LucyEditPipeline(
            transformer=_transformer(),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * LATENTS,
        out_channels=LATENTS,
        text_dim=STATES,
        freq_dim=32,
        ffn_dim=64,
    )


def _vae() -> AutoencoderKLWan:
    """Return a small VAE with the structure of Wan 2.2's: one latent per 16 x 16 pixels."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=LATENTS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(LATENTS)],
        latents_std=[1.0 + i for i in range(LATENTS)],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def _text_encoder() -> UMT5EncoderModel:
    sizes = {"d_model": STATES, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=300, **sizes)).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that appends an end token, as UMT5's does."""
    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

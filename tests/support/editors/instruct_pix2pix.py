"""Create a tiny StableDiffusionInstructPix2PixPipeline folder with two levels of cross-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.target import target_noise

TEXT_TOKENS = 77


def build(path: Path) -> Path:
    """Write the pipeline to `path`, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionInstructPix2PixPipeline(
            unet=UNet2DConditionModel(
                sample_size=4,
                in_channels=8,
                out_channels=4,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=24,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=byte_tokenizer(),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path)
    return path


def small_vae(**config: object) -> AutoencoderKL:
    """Create a VAE whose latents have four channels and 1/8 of the image size."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )


def text_config(**config: object) -> CLIPTextConfig:
    """Return the config of a two-layer text encoder for `byte_tokenizer`."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_TOKENS,
    }
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return CLIPTextConfig(vocab_size=514, **ends, **(sizes | config))


def byte_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Create a tokenizer of single bytes, without merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges=[], pad_token=pad_token, model_max_length=TEXT_TOKENS)


def watch_projections(unet: UNet2DConditionModel) -> dict[str, list[torch.Tensor]]:
    """Return a dictionary that the next forward fills: attention module -> [k, v] (B, tokens, channels).

    The values are outputs of the UNet's own `to_k` and `to_v`, in the order of the calls.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_k", ".to_v")):
            attention = name.rpartition(".")[0]
            module.register_forward_hook(lambda _m, _a, out, at=attention: seen.setdefault(at, []).append(out))
    return seen


def assert_trained_timestep(
    editor: DiffusersEditor,
    picture: dict[str, Any],
    *,
    t: float,
    timestep: int,
    betas: tuple[float, float],
    scaling: float,
) -> None:
    """Check that noise level `t` gives the UNet `timestep` and latents noised like in its DDPM training.

    betas: first and last beta of the released "scaled_linear" schedule of 1000 steps; scaling: the released VAE's
    `scaling_factor`.
    """
    given: list[Any] = []
    editor.denoiser.register_forward_pre_hook(lambda _m, args: given.extend(args))
    editor.encode([picture], ["go"])
    sample, at = given
    assert at == timestep
    noisy, reference = sample.chunk(2, dim=1)
    noise = target_noise(noisy.shape, noisy)
    first, last = (beta**0.5 for beta in betas)
    kept = torch.cumprod(1 - torch.linspace(first, last, 1000) ** 2, 0)[timestep]
    expected = noise if t == 1 else kept**0.5 * scaling * reference + (1 - kept) ** 0.5 * noise
    assert torch.allclose(noisy, expected, atol=1e-5)

"""Architecture of `tiny`: the configs of its parts, and an untrained pipeline with them.

All parts are diffusers and transformers classes with small configs, so code that loads FLUX.2-klein loads tiny.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline
    from transformers import PreTrainedTokenizerFast

TEXT_LAYERS = (1, 2, 3)
MAX_TEXT_TOKENS = 64
IMAGE_SIZE = 128
PREFIX_TIMESTEP = 0.0
"""Timestep that modulates the prefix, both in training and in use. See docs/reference/tiny.md."""

VAE_CONFIG: dict[str, object] = {
    "block_out_channels": (16, 32, 64, 64),
    "decoder_block_out_channels": (16, 24, 48, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
    "mid_block_add_attention": False,
}
TRANSFORMER_CONFIG: dict[str, object] = {
    "in_channels": 32,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 3 * 128,
    "mlp_ratio": 2.5,
    "axes_dims_rope": (4, 12, 12, 4),
    "rope_theta": 2000,
    "guidance_embeds": False,
}
TEXT_CONFIG: dict[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VOCABULARY = 512

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def build_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """Return an untrained `Flux2KleinPipeline` with tiny's configs: float32 weights, drawn with `seed`."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = Qwen3Config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **TEXT_CONFIG,
        )
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKLFlux2(**VAE_CONFIG).eval(),
            text_encoder=Qwen3ForCausalLM(text_config).eval(),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(**TRANSFORMER_CONFIG).eval(),
            is_distilled=True,
        )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 512 entries, trained on tabletop instructions. It encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )


def _sentences() -> Iterator[str]:
    from imagewam_cli.sim.tabletop.scene import sample_scene

    for seed in range(2000):
        yield sample_scene(seed).instruction
    for sentence in _OTHER_SENTENCES:
        yield from [sentence] * 20


_OTHER_SENTENCES = (
    "push the button from the top",
    "open the drawer and then close the door",
    "reach the goal with the arm",
    "pick the object up and place it into the basket",
    "slide the plate into the cabinet",
    "press the handle down",
    "pull the lever and turn the faucet on",
)


def save_pipeline(pipeline: Flux2KleinPipeline, folder: Path) -> None:
    """Write the pipeline as a diffusers folder, weights as float16 safetensors."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):  # drop the path of the machine that built it
        text = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(text, dict) and "_name_or_path" in text:
            del text["_name_or_path"]
            path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

"""Create a complete tiny, untrained Qwen-Image-Edit pipeline folder with the released classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
_WIDTH = 32
_LATENTS = 4
_PIXELS_READ = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
"""Fewest and most pixels of an image for the released text encoder."""
_SENTENCES = ("put the red block on the blue zone", "Picture 1: open the drawer and then close the door")


def build(path: Path, plus: bool = False, *, zero_cond_t: bool = False) -> Path:
    """Write the folder: two layers, 2 heads of 16, 16 x 16 pixels per token, text states of size 32.

    plus: for QwenImageEditPlusPipeline; zero_cond_t: as in the 2511 release.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )

    family = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = family(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=_LATENTS,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, -0.4],
                latents_std=[1.5, 0.5, 2.0, 0.8],
            ),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(family(**dict.fromkeys(_PARTS)).prompt_template_encode),
            processor=None,
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * _LATENTS,
                out_channels=_LATENTS,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=_WIDTH,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=zero_cond_t,
            ),
        )
    pipeline.save_pretrained(path)
    save_processor(path, pipeline.tokenizer)
    return path


def text_encoder() -> Any:
    """Create a Qwen2.5-VL with the ids of special tokens from `tokenizer`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = {"hidden_size": _WIDTH, "intermediate_size": 48}
    at = {token: i for i, token in enumerate(SPECIAL)}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **sizes,
                "vocab_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
                "bos_token_id": None,
                "eos_token_id": at["<|im_end|>"],
            },
            vision_config={
                **sizes,
                "depth": 2,
                "num_heads": 2,
                "out_hidden_size": _WIDTH,
                "fullatt_block_indexes": [1],
            },
            image_token_id=at["<|image_pad|>"],
            video_token_id=at["<|video_pad|>"],
            vision_start_token_id=at["<|vision_start|>"],
            vision_end_token_id=at["<|vision_end|>"],
        )
    ).eval()


def tokenizer(template: str) -> Any:
    """Train byte pairs on the pipeline's own template, so that it takes few tokens. The first ids are `SPECIAL`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([template, *_SENTENCES] * 3, trainer)
    model = json.loads(learned.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=list(SPECIAL[1:]),
        pad_token=SPECIAL[0],
        model_max_length=1024,
    )


def save_processor(path: Path, tokenizer: Any) -> None:
    """Write the files of a Qwen2VLProcessor and name it in the index, like the released folders.

    The processor itself cannot be created here, because its video part needs torchvision.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer.save_pretrained(path / "processor")
    Qwen2VLImageProcessorPil(size=dict(_PIXELS_READ)).save_pretrained(path / "processor")
    index = json.loads((path / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))

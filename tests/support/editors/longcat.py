"""Create a complete LongCat-Image-Edit pipeline folder with about 190,000 random weights.

Each part is saved separately, because the pipeline's own processor class would need torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.editors.flux_kontext import flux_vae

AXES = (4, 6, 6)
_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def build(path: Path) -> Path:
    """Write a pipeline with two double blocks, one single block, 2 heads of 16, and a scheduler without a shift."""
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "transformer": LongCatImageTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=1,
                attention_head_dim=sum(AXES),
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=AXES,
            ),
            "vae": flux_vae(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(_text_config(tokenizer)),
            "tokenizer": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        }
    for name, part in parts.items():
        part.save_pretrained(path / name)
    (path / "text_processor").mkdir()
    (path / "text_processor" / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "LongCatImageEditPipeline"}))
    return path


class ImageProcessorAlone:
    """The part of the processor that the pipeline uses."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


def load_pipeline(path: Path) -> Any:
    """Load the library's pipeline from the folder."""
    return LongCatImageEditPipeline(
        transformer=LongCatImageTransformer2DModel.from_pretrained(path / "transformer"),
        vae=AutoencoderKL.from_pretrained(path / "vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "text_encoder"),
        tokenizer=Qwen2Tokenizer.from_pretrained(path / "tokenizer"),
        text_processor=ImageProcessorAlone(Qwen2VLImageProcessorPil.from_pretrained(path / "text_processor")),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Create a tokenizer of single bytes, without merges."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    return tokenizer


_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 256 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _text_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in _SPECIAL}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )

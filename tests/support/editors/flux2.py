"""Create a tiny Flux2KleinPipeline folder: smaller than `tiny`, with as many text layers as FLUX.2 needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

TEXT_LAYERS = 28
"""Number of text layers: FLUX.2 reads the 9th, 18th and 27th."""


def build(path: Path) -> Path:
    """Write the pipeline to `path` with the same weights every time.

    Norm weights and VAE statistics differ from their initial values, so that a test notices if they are ignored.
    """
    from imagewam_tiny import architecture

    pipeline = small_pipeline(TEXT_LAYERS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        pipeline.vae.bn.running_mean.copy_(torch.randn(32, generator=generator))
        pipeline.vae.bn.running_var.copy_(torch.rand(32, generator=generator) + 0.5)
    architecture.save_pipeline(pipeline, path)
    return path


def small_pipeline(text_layers: int) -> Any:
    """Create an untrained pipeline: one double block, two single blocks, 2 heads of 32."""
    from imagewam_tiny import architecture

    with pytest.MonkeyPatch.context() as patch:
        small = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 3 * 32}
        patch.setattr(architecture, "TRANSFORMER_CONFIG", architecture.TRANSFORMER_CONFIG | small)
        text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        patch.setattr(
            architecture,
            "TEXT_CONFIG",
            architecture.TEXT_CONFIG | text | {"head_dim": 16, "num_hidden_layers": text_layers},
        )
        return architecture.build_pipeline(seed=3)

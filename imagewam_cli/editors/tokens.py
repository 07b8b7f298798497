"""Layouts of attention layers that several families share, and functions that split recorded tokens by segment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagewam_cli.errors import CaptureError
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, Segment, SegmentSpec, TokenPositions

if TYPE_CHECKING:
    from diffusers import ModelMixin


def joint_layers(transformer: ModelMixin, segments: Sequence[SegmentSpec]) -> tuple[LayerSpec, ...]:
    """Return every attention layer of a diffusers joint transformer: its double blocks, then its single blocks, if any.
    All layers hold all segments."""
    kinds: tuple[tuple[str, BlockKind], ...] = (
        ("transformer_blocks", "sequential"),
        ("single_transformer_blocks", "parallel"),
    )
    config = transformer.config
    return tuple(
        layer
        for blocks, kind in kinds
        for layer in equal_layers(
            [f"{blocks}.{i}.attn" for i in range(len(getattr(transformer, blocks, ())))],
            segments,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            block=kind,
        )
    )


def equal_layers(
    names: Iterable[str],
    segments: Sequence[SegmentSpec],
    *,
    heads: int,
    head_dim: int,
    block: BlockKind = "sequential",
) -> tuple[LayerSpec, ...]:
    """Return attention layers that differ only in their module's name, with as many key heads as query heads."""
    return tuple(
        LayerSpec(name=name, block=block, heads=heads, kv_heads=heads, head_dim=head_dim, segments=tuple(segments))
        for name in names
    )


def picture_segment(
    name: Segment, size: tuple[int, int], pixels: int, positions: TokenPositions | None = None
) -> SegmentSpec:
    """Return the segment of a picture of (height, width) pixels whose tokens are `pixels` wide and high. Partial tokens
    at the edge count."""
    rows, columns = (-(-side // pixels) for side in size)
    return SegmentSpec(name=name, tokens=rows * columns, grid=(rows, columns), positions=positions)


def split(layer: LayerSpec, tokens: Tensor) -> tuple[Tensor, ...]:
    """Split a layer's tokens (B, tokens, ...) into its segments.

    Raises:
        CaptureError: the number of tokens differs from the layout.
    """
    if tokens.shape[1] != layer.tokens:
        sizes = " + ".join(f"{s.tokens} {s.name}" for s in layer.segments)
        raise CaptureError(
            f"layer {layer.name} attends to {tokens.shape[1]} tokens, but its plugin declares {sizes}",
            "correct `attention_layers`",
        )
    return torch.split(tokens, [s.tokens for s in layer.segments], dim=1)


def concatenate(parts: Sequence[LayerKV]) -> tuple[Tensor, Tensor]:
    """Concatenate the keys and the values of segments."""
    if len(parts) == 1:
        return parts[0].k, parts[0].v
    return torch.cat([part.k for part in parts], dim=1), torch.cat([part.v for part in parts], dim=1)


def valid_mask(segments: Sequence[SegmentSpec], text_valid: Tensor) -> Tensor:
    """Return bool (B, P), False at the padding of a layer's text."""
    batch = text_valid.shape[0]
    return torch.cat(
        [text_valid if s.name == "text" else text_valid.new_ones(batch, s.tokens) for s in segments], dim=1
    )

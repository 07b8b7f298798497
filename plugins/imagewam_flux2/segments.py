"""Segments of one forward pass of FLUX.2, in the order of their tokens, and their position ids.

As in diffusers' pipeline, text comes first, then the target in mode `denoise`, then each reference. The target has the
size of the first reference, and t = 0. The references have t = 10, 20, ...
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from imagewam_cli.plugin import PrefixSettings, Segment, SegmentSpec, TokenPositions, picture_segment, segment_ids
from imagewam_flux2 import PIXELS_PER_TOKEN
from imagewam_flux2.tokens import REFERENCE_T, TARGET_T


def picture_segments(settings: PrefixSettings) -> tuple[SegmentSpec, ...]:
    """Return the segments of the pictures of one forward pass, each with its own grid."""
    sizes = settings.reference_sizes
    target = (_picture("target", sizes[0], TARGET_T),) if settings.mode == "denoise" else ()
    return (*target, *(_picture("reference", size, REFERENCE_T * (1 + i)) for i, size in enumerate(sizes)))


def text_segment(tokens: int) -> SegmentSpec:
    """Return the text segment, whose ids count along the last axis."""
    return SegmentSpec(name="text", tokens=tokens, positions=TokenPositions(origin=(0.0,) * 4, moves=((3,),)))


def picture_ids(pictures: Iterable[SegmentSpec]) -> Tensor:
    """Return the position ids of the pictures' tokens, float32 (tokens, 4)."""
    return torch.cat([segment_ids(picture) for picture in pictures])


def _picture(name: Segment, size: tuple[int, int], t: int) -> SegmentSpec:
    positions = TokenPositions(origin=(float(t), 0.0, 0.0, 0.0), moves=((1,), (2,)))
    return picture_segment(name, size, PIXELS_PER_TOKEN, positions)

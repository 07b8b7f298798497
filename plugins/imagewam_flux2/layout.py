"""Which pictures one forward of FLUX.2 is given, in the order of their tokens, and their position ids.

Text comes first, then the pictures, in the order of diffusers' pipeline: the target where there is one, then each
reference. A target is as large as the first reference, as the pipeline makes it; it has t = 0, references have t = 10,
20, ... in their order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from imagewam_cli.diffusers_editor import picture_segment, reference_sizes
from imagewam_cli.editor import PrefixSettings
from imagewam_cli.kvcache.spec import SegmentSpec
from imagewam_flux2.tokens import REFERENCE_T, TARGET_T, image_ids

PIXELS_PER_TOKEN = 16


def picture_segments(settings: PrefixSettings) -> tuple[SegmentSpec, ...]:
    """The pictures of one forward, each with its own grid. settings: resolved."""
    references = [picture_segment("reference", size, PIXELS_PER_TOKEN) for size in reference_sizes(settings)]
    target = (dataclasses.replace(references[0], name="target"),) if settings.mode == "denoise" else ()
    return (*target, *references)


def picture_ids(pictures: Iterable[SegmentSpec]) -> Tensor:
    """Position ids of their tokens one after another, float32 (tokens, 4)."""
    turns = itertools.count(REFERENCE_T, REFERENCE_T)
    return torch.cat(
        [image_ids(*p.grid, t=TARGET_T if p.name == "target" else next(turns)) for p in pictures if p.grid is not None]
    )

"""How Qwen-Image-Edit's transformer sees pictures: packed latents, and positions in three axes (frame, row, column).

Picture -> VAE mean -> normalised by the VAE's constants -> 2x2 space-to-channel -> tokens (B, h w, C), rows first. The
target is frame 0 and the references are frames 1, 2, ... of one sequence; rows and columns are counted from the middle
of each picture. Text token i has the same id on all axes, half the longest side of the pictures plus i.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from imagewam_cli.plugin import TokenPositions, patch_tokens
from imagewam_qwen import PIXELS_PER_TOKEN

ACTION_FRAME = -1
"""Frames are counted from 0, and text ids are never negative: whatever the number of pictures and their size, no token
of the editor has a frame below 0. -1 lies beside the target, within the distances between frames that the editor was
trained on."""

Shape = tuple[int, int, int]
"""(frames, rows, columns) of one picture's tokens."""


def picture_latents(vae: Any, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> tokens (B, H W / 256, 4 C)."""
    latents = vae.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return patch_tokens((latents - mean) / std)


def picture_shape(size: tuple[int, int], *, frames: int = 1) -> Shape:
    """Return the shape of a picture of (height, width) pixels. With no frames, it has ids but no tokens."""
    height, width = size
    return frames, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def picture_positions(size: tuple[int, int], frame: int) -> TokenPositions:
    """Return the positions of a picture of (height, width) pixels. An odd row or column goes before the middle."""
    _, rows, columns = picture_shape(size)
    return TokenPositions(
        origin=(float(frame), float(rows // 2 - rows), float(columns // 2 - columns)), moves=((1,), (2,))
    )


def text_start(sizes: Iterable[tuple[int, int]]) -> int:
    """Return the id of the first text token, for pictures of (height, width) pixels."""
    return max(side // 2 for size in sizes for side in picture_shape(size)[1:])


def text_positions(sizes: Iterable[tuple[int, int]]) -> TokenPositions:
    """Return the positions of text, for pictures of (height, width) pixels."""
    return TokenPositions(origin=(float(text_start(sizes)),) * 3, moves=((0, 1, 2),))


@contextlib.contextmanager
def without_target(transformer: Any) -> Iterator[None]:
    """Inside, the first of the transformer's `img_shapes` may have no frames: what follows has the positions that it
    has behind a target, and the transformer sees no target."""
    handles = (
        transformer.pos_embed.register_forward_pre_hook(_with_target),
        transformer.pos_embed.register_forward_hook(_target_dropped),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_target(_module: Any, args: tuple[list[list[Shape]]]) -> tuple[list[list[Shape]]]:
    (_, rows, columns), *references = args[0][0]
    return ([[(1, rows, columns), *references]],)


def _target_dropped(_module: Any, args: tuple[list[list[Shape]]], output: tuple[Tensor, Tensor]) -> Any:
    pictures, text = output
    return pictures[prod(args[0][0][0]) :], text

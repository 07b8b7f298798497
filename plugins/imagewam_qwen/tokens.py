"""Tokens and positions of Qwen-Image-Edit: packed latents, and position ids with three axes (frame, row, column).

Picture -> VAE mean -> normalized by the VAE's constants -> 2x2 space-to-channel -> tokens (B, h w, C) in row
order. The target is frame 0, the references are frames 1, 2, ... Rows and columns are counted from the middle of each
picture. Text token i has the same id on all axes: i plus half the longest side of the pictures, in tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imagewam_cli.plugin import TokenPositions, patch_tokens
from imagewam_qwen import PIXELS_PER_TOKEN

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

ACTION_FRAME = -1
"""Frame id of action tokens. Frames count from 0 and text ids are never negative, so no token of the editor has a frame
below 0. -1 is next to the target, within the distances between frames that the editor was trained on."""

Shape = tuple[int, int, int]
"""Numbers of (frames, rows, columns) of one picture's tokens."""


def picture_latents(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Encode pictures (B, 3, H, W) in [-1, 1] as tokens (B, H W / 256, 4 C)."""
    latents = vae.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return patch_tokens((latents - mean) / std)


def picture_shape(size: tuple[int, int], *, frames: int = 1) -> Shape:
    """Return the shape of a picture of (height, width) pixels. With 0 frames it has position ids but no tokens."""
    height, width = size
    return frames, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def picture_positions(size: tuple[int, int], frame: int) -> TokenPositions:
    """Return the positions of a picture of (height, width) pixels. An odd row or column comes before the middle."""
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
def without_target(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """Run the transformer without target tokens: the first entry of `img_shapes` may have 0 frames.

    References and text keep the positions that follow a target.
    """
    handles = (
        transformer.pos_embed.register_forward_pre_hook(_with_target),
        transformer.pos_embed.register_forward_hook(_drop_target),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_target(_module: nn.Module, args: tuple[list[list[Shape]]]) -> tuple[list[list[Shape]]]:
    # rotary ids are computed as if there were a target; `_drop_target` then removes the target's ids
    (_, rows, columns), *references = args[0][0]
    return ([[(1, rows, columns), *references]],)


def _drop_target(
    _module: nn.Module, args: tuple[list[list[Shape]]], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    pictures, text = output
    return pictures[prod(args[0][0][0]) :], text

"""`JointEditor`: an editor on a joint transformer in the shape of FLUX.1, except for what makes its family a family.

The denoiser attends over [text | target | reference], all modulated by one timestep. A picture's token is a 2x2 patch
of VAE latents, row by row, with position ids (which picture, row, column). Two modes:

- `denoise`: the whole editing step, noise in place of the target (`flow_target`), everything sees everything.
- `prefix`: [text | reference] alone, with the ids and the modulation that they have in the whole step. It is what the
  whole step gives where text and reference are kept from seeing the target, which pretraining does not do.

By default mode `prefix`: what actions attend to is text and reference, untouched by noise, and no target's tokens are
computed. By default timestep 1, in both modes: one vector modulates target and reference alike, so in pretraining the
reference was seen under the target's timestep, and under 0 practically never. At 1 the pipelines start: the target says
nothing there, and what the network knows of the edit it has from text and reference, as a policy does.

A subclass says which ids its tokens have and how its transformer is called.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.settings import PrefixSettings
from imagewam_cli.editors.target import flow_target
from imagewam_cli.editors.text import Text
from imagewam_cli.editors.tokens import joint_layers, picture_segment
from imagewam_cli.prefix.positions import segment_ids
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, Segment, SegmentSpec, TokenPositions

PIXELS_PER_TOKEN = 16
"""Width and height of a token's piece of a picture: latents of 8 pixels, two by two."""


class JointEditor(DiffusersEditor):
    """A pipeline folder with an `AutoencoderKL` in `vae/` and a FLUX.1-like transformer as an `Editor`."""

    picture_ids: ClassVar[Mapping[Segment, int]]
    """What the first position id says: which of the pictures a token belongs to."""
    text_moves: ClassVar[tuple[int, ...]]
    """The position ids that grow from text token to text token; the first token has zeros."""
    action_id: ClassVar[int]
    """The first position id of actions, unlike that of text and pictures; they count along the second."""

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        return joint_layers(denoiser, cls.token_segments(settings, text))

    @classmethod
    def token_segments(cls, settings: PrefixSettings, text: int) -> tuple[SegmentSpec, ...]:
        """Those of the mode's forward, in the order of the tokens, with their position ids."""
        size, start = settings.image_size, float(cls.picture_start(settings, text))
        segments = []
        for name in cls.entry.defaults.modes[settings.mode].segments:
            if name == "text":
                positions = TokenPositions(origin=(0.0, 0.0, 0.0), moves=(cls.text_moves,))
                segments.append(SegmentSpec(name=name, tokens=text, positions=positions))
            else:
                origin = (float(cls.picture_ids[name]), start, start)
                positions = TokenPositions(origin=origin, moves=((1,), (2,)))
                segments.append(picture_segment(name, size, PIXELS_PER_TOKEN, positions))
        return tuple(segments)

    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.pos_embed.theta),
            action_axis=1,
            action_ids=(cls.action_id, 0, 0),
        )

    @classmethod
    def picture_start(cls, settings: PrefixSettings, text: int) -> int:
        """Row and column id of a picture's first token, behind `text` text tokens."""
        return 0

    @abc.abstractmethod
    def forward(self, image: Tensor, text: Text, mask: Tensor | None, **inputs: Tensor) -> None:
        """Call the transformer.

        image: tokens (B, N, C) of the pictures, target first; mask: bool (B, 1, 1, L + N), which tokens are seen, or
        None where all are; inputs: timestep (B,) in [0, 1], txt_ids (L, 3), img_ids (N, 3).
        """

    def run(self, pictures: Tensor, text: Text) -> None:
        t = self.settings.timestep
        reference = latent_tokens(self.part["vae"], pictures)
        tokens = {"target": flow_target(reference, t), "reference": reference}
        of_text, *of_pictures = self.token_segments(self.settings, text.embeds.shape[1])
        image = torch.cat([tokens[segment.name] for segment in of_pictures], dim=1)
        seen = torch.cat([text.valid, text.valid.new_ones(image.shape[:2])], dim=1)
        self.forward(
            image,
            text,
            None if bool(seen.all()) else seen[:, None, None, :],
            # rounded as the pipelines round it: they count timesteps to 1000 in the model's dtype
            timestep=torch.full((len(image),), 1000 * t, dtype=self.dtype, device=self.device) / 1000,
            txt_ids=segment_ids(of_text).to(self.device),
            img_ids=torch.cat([segment_ids(segment) for segment in of_pictures]).to(self.device),
        )


def latent_tokens(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> tokens (B, H W / 256, 4 C), rows first: the VAE's mean, shifted and scaled as
    its config says, in 2x2 patches."""
    latents = vae.encode(pictures).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return patch_tokens(latents)


def patch_tokens(latents: Tensor) -> Tensor:
    """2x2 patches of latents (B, C, 2 h, 2 w) as tokens (B, h w, 4 C), rows first, channels ordered (c, dy, dx)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def grid_ids(first: int, rows: int, columns: int) -> Tensor:
    """Position ids (first, row, column) of a picture's tokens, float32 (rows * columns, 3), rows first."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat([torch.full((len(places), 1), float(first)), places], dim=1)

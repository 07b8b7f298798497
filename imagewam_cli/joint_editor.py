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
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.diffusers_editor import DiffusersEditor, flow_target, joint_layers, picture_segment
from imagewam_cli.editor import PrefixSettings
from imagewam_cli.editor_defaults import EditorDefaults, ModeDefaults
from imagewam_cli.kvcache.spec import LayerSpec, RopeSpec, Segment, SegmentSpec
from imagewam_cli.text_states import Text

PIXELS_PER_TOKEN = 16
"""Width and height of a token's piece of a picture: latents of 8 pixels, two by two."""


class JointEditor(DiffusersEditor):
    """A pipeline folder with an `AutoencoderKL` in `vae/` and a FLUX.1-like transformer as an `Editor`."""

    defaults = EditorDefaults(
        modes={
            "prefix": ModeDefaults(timestep=1.0, has=("text", "reference"), keeps=("text", "reference")),
            "denoise": ModeDefaults(timestep=1.0, has=("text", "target", "reference"), keeps=("text", "reference")),
        },
        text_padding="keep",
        compute_dtype="bfloat16",
        camera_size=(512, 512),
        multiple=PIXELS_PER_TOKEN,
        max_text_tokens=512,
    )
    picture_ids: ClassVar[Mapping[Segment, int]]
    """What the first position id says: which of the pictures a token belongs to."""
    action_id: ClassVar[int]
    """The first position id of actions, unlike that of text and pictures; they count along the second."""

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        assert settings.image_size is not None
        size = settings.image_size
        return joint_layers(
            denoiser,
            [
                SegmentSpec(name=name, tokens=text) if name == "text" else picture_segment(name, size, PIXELS_PER_TOKEN)
                for name in cls.defaults.segments(settings)
            ],
        )

    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.pos_embed.theta),
            action_axis=1,
            action_ids=(cls.action_id, 0, 0),
        )

    @abc.abstractmethod
    def text_ids(self, length: int) -> Tensor:
        """Position ids of `length` text tokens, float32 (length, 3)."""

    @property
    def picture_start(self) -> int:
        """Row and column id of a picture's first token."""
        return 0

    @abc.abstractmethod
    def forward(self, image: Tensor, text: Text, mask: Tensor | None, **inputs: Tensor) -> None:
        """Call the transformer.

        image: tokens (B, N, C) of the pictures, target first; mask: bool (B, 1, 1, L + N), which tokens are seen, or
        None where all are; inputs: timestep (B,) in [0, 1], txt_ids (L, 3), img_ids (N, 3).
        """

    def run(self, pictures: Tensor, text: Text) -> None:
        t = self.settings.timestep
        assert t is not None
        reference = latent_tokens(self.part["vae"], pictures)
        tokens = {"target": flow_target(reference, t), "reference": reference}
        image = torch.cat([tokens[name] for name in self._pictures], dim=1)
        seen = torch.cat([text.valid, text.valid.new_ones(image.shape[:2])], dim=1)
        self.forward(
            image,
            text,
            None if bool(seen.all()) else seen[:, None, None, :],
            # rounded as the pipelines round it: they count timesteps to 1000 in the model's dtype
            timestep=torch.full((len(image),), 1000 * t, dtype=self.dtype, device=self.device) / 1000,
            txt_ids=self.text_ids(text.embeds.shape[1]).to(self.device),
            img_ids=self._image_ids.to(self.device),
        )

    @property
    def _pictures(self) -> tuple[Segment, ...]:
        """The pictures of the mode's forward, in the order of the tokens."""
        return tuple(name for name in self.defaults.segments(self.settings) if name != "text")

    @functools.cached_property
    def _image_ids(self) -> Tensor:
        assert self.settings.image_size is not None
        rows, columns = (side // PIXELS_PER_TOKEN for side in self.settings.image_size)
        start = self.picture_start
        return torch.cat([grid_ids(self.picture_ids[name], rows, columns, start) for name in self._pictures])


def latent_tokens(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> tokens (B, H W / 256, 4 C), rows first: the VAE's mean, shifted and scaled as
    its config says, in 2x2 patches."""
    latents = vae.encode(pictures).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return patch_tokens(latents)


def patch_tokens(latents: Tensor) -> Tensor:
    """2x2 patches of latents (B, C, 2 h, 2 w) as tokens (B, h w, 4 C), rows first, channels ordered (c, dy, dx)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def grid_ids(first: int, rows: int, columns: int, start: int = 0) -> Tensor:
    """Position ids (first, start + row, start + column) of a picture's tokens, float32 (rows * columns, 3), rows
    first."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() + start
    return torch.cat([torch.full((len(places), 1), float(first)), places], dim=1)

"""`JointEditor`: base class of the editors on joint transformers like FLUX.1.

The denoiser attends over [text | target | reference], all modulated by one timestep. A picture's token is a 2x2 patch
of VAE latents, in row order, with position ids (which picture, row, column). There are two modes:

- `denoise`: the complete editing step, with noise as the target (`flow_target`); all tokens attend to each other.
- `prefix`: only [text | reference], with the ids and the modulation of the complete step. It equals a complete step in
  which text and reference do not attend to the target, although in pretraining they do.

The first-party entries make `prefix` the default: actions then attend to text and reference without noise, and no
target tokens are computed. They use timestep 1 in both modes. One vector modulates both target and reference, so in
pretraining the reference had the target's timestep, which was almost never 0. The pipelines start at 1,
where the target carries no information: the network knows the edit from text and reference alone, as a policy does.

A subclass defines the ids of its tokens and calls its transformer.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

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

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin

PIXELS_PER_TOKEN = 16
"""Width and height of the patch of a token: two by two latents of 8 pixels."""


class JointEditor(DiffusersEditor):
    """A pipeline folder with an `AutoencoderKL` in `vae/` and a FLUX.1-like transformer as an `Editor`."""

    picture_ids: ClassVar[Mapping[Segment, int]]
    """First position id of the tokens of each picture."""
    text_moves: ClassVar[tuple[int, ...]]
    """Axes along which the ids of text tokens grow, from zero at the first token."""
    action_id: ClassVar[int]
    """First position id of actions, which no text or picture has. Actions are counted along the second axis."""

    @classmethod
    def attention_layers(cls, denoiser: ModelMixin, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        return joint_layers(denoiser, cls.token_segments(settings, text))

    @classmethod
    def token_segments(cls, settings: PrefixSettings, text: int) -> tuple[SegmentSpec, ...]:
        """Return the segments of the mode's forward pass, in the order of the tokens, with their position ids."""
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
    def rope(cls, denoiser: ModelMixin) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.pos_embed.theta),
            action_axis=1,
            action_ids=(cls.action_id, 0, 0),
        )

    @classmethod
    def picture_start(cls, settings: PrefixSettings, text: int) -> int:
        """Return the row and column id of a picture's first token, which follows `text` text tokens."""
        return 0

    @abc.abstractmethod
    def forward(self, image: Tensor, text: Text, mask: Tensor | None, **inputs: Tensor) -> None:
        """Call the transformer.

        image: tokens (B, N, C) of the pictures, target first; mask: bool (B, 1, 1, L + N), False at masked tokens, or
        None if there are none; inputs: timestep (B,) in [0, 1], txt_ids (L, 3), img_ids (N, 3).
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
            # the pipelines store timesteps up to 1000 in the model's dtype, which rounds them
            timestep=torch.full((len(image),), 1000 * t, dtype=self.dtype, device=self.device) / 1000,
            txt_ids=segment_ids(of_text).to(self.device),
            img_ids=torch.cat([segment_ids(segment) for segment in of_pictures]).to(self.device),
        )


def latent_tokens(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures (B, 3, H, W) in [-1, 1] as tokens (B, H W / 256, 4 C), in row order: 2x2 patches of the VAE's
    mean, shifted and scaled according to its config."""
    latents = vae.encode(pictures).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return patch_tokens(latents)


def patch_tokens(latents: Tensor) -> Tensor:
    """Convert latents (B, C, 2 h, 2 w) to tokens (B, h w, 4 C): 2x2 patches in row order, channels ordered (c, dy,
    dx)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def grid_ids(first: int, rows: int, columns: int) -> Tensor:
    """Return the position ids (first, row, column) of a picture's tokens, float32 (rows * columns, 3), in row order."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat([torch.full((len(cells), 1), float(first)), cells], dim=1)

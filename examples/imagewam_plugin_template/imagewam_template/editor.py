"""Lucy Edit as an editor: one denoising step on one frame, noise concatenated with the picture's latents.

The picture enters by channel concatenation, so no token belongs to the reference alone: self-attention (`attn1`) holds
the target. Cross-attention (`attn2`) holds the text. It is not offered, because its keys are not rotated and `rope`
applies to every layer; from the second block on, the target's tokens have read the instruction anyway. Default timestep
1: the pipeline starts there, from noise alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imagewam_cli.plugin import (
    DiffusersEditor,
    LayerSpec,
    PrefixSettings,
    Prompt,
    RopeSpec,
    Text,
    TokenPositions,
    equal_layers,
    flow_target,
    picture_segment,
)

PIXELS_PER_TOKEN = 32
"""The VAE turns 16 x 16 pixels into one latent, the transformer 2 x 2 latents into one token."""
POSITIONS = TokenPositions(origin=(0.0, 0.0, 0.0), moves=((1,), (2,)))
"""Ids are (frame, row, column), and there is one frame."""


class LucyEditor(DiffusersEditor):
    """A LucyEditPipeline folder as an `Editor`."""

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        config = denoiser.config
        names = [f"blocks.{i}.attn1" for i in range(config.num_layers)]
        target = picture_segment("target", settings.image_size, PIXELS_PER_TOKEN, POSITIONS)
        return equal_layers(names, [target], heads=config.num_attention_heads, head_dim=config.attention_head_dim)

    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        size = denoiser.config.attention_head_dim
        side = 2 * (size // 6)  # channels of each head rotated by the row, and as many by the column
        # No token has frame 1, and the model knows it from videos. Actions count along its rows; along the frames,
        # action 0 would share its position with the first token.
        return RopeSpec(axes=(size - 2 * side, side, side), theta=10_000.0, action_axis=1, action_ids=(1, 0, 0))

    def embed(self, prompt: str, picture: Any) -> Prompt:
        ids, mask = self.tokenized(prompt)
        states = self.part["text_encoder"](ids, attention_mask=mask).last_hidden_state[0]
        return Prompt(states=states * mask[0, :, None])  # states of padding are zero, as in the pipeline

    def run(self, pictures: Tensor, text: Text) -> None:
        vae, timestep = self.part["vae"], self.settings.timestep
        latents = vae.encode(pictures[:, :, None]).latent_dist.mode()  # (B, C, 1 frame, H / 16, W / 16)
        mean, std = (torch.tensor(x).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std))
        current = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        self.denoiser(
            hidden_states=torch.cat([flow_target(current, timestep), current], dim=1),
            timestep=torch.full((len(pictures),), 1000 * timestep, device=self.device),
            encoder_hidden_states=text.embeds,
        )

"""Lucy Edit as an editor: one denoising step on one frame, noise beside the picture's latents.

The picture enters by channel concatenation, so no token is the reference's alone: self-attention (`attn1`) holds the
target. Cross-attention (`attn2`) holds the text, and is not offered: its keys are not rotated, and `rope` speaks for
every layer. The instruction is in the target's tokens from the second block on. Default timestep 1: there the pipeline
starts, from noise alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imagewam_cli.editors.contract import PrefixSettings
from imagewam_cli.editors.defaults import EditorDefaults, ModeDefaults
from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.target import flow_target
from imagewam_cli.editors.text import Prompt, Text
from imagewam_cli.editors.tokens import picture_segment
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, TokenPositions

PIXELS_PER_TOKEN = 32
"""The VAE makes one latent of 16 x 16 pixels, the transformer one token of 2 x 2 latents."""
TEXT_TOKENS = 512
POSITIONS = TokenPositions(origin=(0.0, 0.0, 0.0), moves=((1,), (2,)))
"""Ids are (frame, row, column), and there is one frame."""


class LucyEditor(DiffusersEditor):
    """A LucyEditPipeline folder as an `Editor`."""

    defaults = EditorDefaults(
        modes={"denoise": ModeDefaults(timestep=1.0, has=("target",), keeps=("target",))},
        text_padding="keep",
        text_paddings=("keep",),  # the cross-attention takes no mask: padding cannot be hidden
        compute_dtype="bfloat16",
        camera_size=(480, 480),
        multiple=PIXELS_PER_TOKEN,
        max_text_tokens=TEXT_TOKENS,
    )

    @staticmethod
    def part_classes() -> dict[str, Any]:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from transformers import AutoTokenizer, UMT5EncoderModel

        models = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
        return models | {"tokenizer": AutoTokenizer}

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        assert settings.image_size is not None
        heads, size = denoiser.config.num_attention_heads, denoiser.config.attention_head_dim
        held = (picture_segment("target", settings.image_size, PIXELS_PER_TOKEN, POSITIONS),)
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": size}
        paths = [f"blocks.{i}.attn1" for i in range(denoiser.config.num_layers)]
        return tuple(LayerSpec(name=path, block="sequential", segments=held, **sizes) for path in paths)

    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        size = denoiser.config.attention_head_dim
        side = 2 * (size // 6)  # of each head: numbers that turn with the row, and as many with the column
        # frame 1 is nobody's, would come next, and is known to the model from videos. Actions count along its rows;
        # along the frames, action 0 would stand on the first token
        return RopeSpec(axes=(size - 2 * side, side, side), theta=10_000.0, action_axis=1, action_ids=(1, 0, 0))

    def text_tokens(self, prompt: str) -> int:
        return TEXT_TOKENS

    def embed(self, prompt: str, picture: Any) -> Prompt:
        tokens = self.part["tokenizer"](prompt, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        states = self.part["text_encoder"](tokens.input_ids.to(self.device)).last_hidden_state[0]
        padding = states.new_zeros(TEXT_TOKENS - len(states), states.shape[1])  # zeros, as the pipeline has them
        return Prompt(states=torch.cat([states, padding]))

    def run(self, pictures: Tensor, text: Text) -> None:
        assert self.settings.timestep is not None
        vae = self.part["vae"]
        latents = vae.encode(pictures[:, :, None]).latent_dist.mode()  # (B, C, 1 frame, H / 16, W / 16)
        mean, std = (torch.tensor(x).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std))
        current = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        self.denoiser(
            hidden_states=torch.cat([flow_target(current, self.settings.timestep), current], dim=1),
            timestep=torch.full((len(pictures),), 1000 * self.settings.timestep, device=self.device),
            encoder_hidden_states=text.embeds,
        )

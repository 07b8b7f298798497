"""InstructPix2Pix as an editor: one step of its UNet on noise and the picture's latents.

The picture's latents are concatenated with the noise as channels, so no token belongs only to the reference.
Self-attention holds the target at each resolution, cross-attention holds the text. The only mode is `denoise`, with the
conditional branch only.

The default timestep is 1, where the pipeline starts from pure noise: the network infers the edit from picture and
instruction alone, as a policy does. Below 1 a target is needed, and the current picture, noised to that timestep,
replaces it. t in [0, 1] is the training timestep t (N - 1), rounded. By default only the target is kept, which has
attended to the text; `--segments text,target` adds the cross-attention. Default size: 256 pixels, at which the editor
was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagewam_cli.plugin import (
    DiffusersEditor,
    LayerSpec,
    PrefixSettings,
    Prompt,
    SegmentSpec,
    SharedSize,
    Text,
    UInt8Image,
    picture_segment,
    target_noise,
    text_width,
)
from imagewam_instruct_pix2pix import PIXELS_PER_LATENT

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class InstructPix2PixEditor(DiffusersEditor):
    """A StableDiffusionInstructPix2PixPipeline folder as an `Editor`."""

    @classmethod
    def attention_layers(
        cls, denoiser: UNet2DConditionModel, settings: PrefixSettings, text: int
    ) -> tuple[LayerSpec, ...]:
        return unet_layers(denoiser, settings.image_size, text)

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        encoders = tuple(f"{encoder}.hidden_size" for encoder in cls.text_encoders)
        return (
            text_width(*encoders, taken="unet.cross_attention_dim"),
            SharedSize(
                what="number of channels of noise and picture",
                given=("vae.latent_channels",),
                times=2,
                taken="unet.in_channels",
            ),
        )

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        encoder, (ids, mask) = self.part["text_encoder"], self.tokenized(prompt)
        masked = getattr(encoder.config, "use_attention_mask", False)
        return Prompt(states=encoder(ids, attention_mask=mask if masked else None)[0][0])

    def run(self, pictures: Tensor, text: Text) -> None:
        reference = self.reference_latents(pictures)
        timestep, noisy = self._start(reference)
        self.part["unet"](
            torch.cat([noisy, reference], dim=1),
            timestep,
            encoder_hidden_states=text.embeds,
            encoder_attention_mask=None if bool(text.valid.all()) else text.valid,
            added_cond_kwargs=self.added_conditions(text),
            return_dict=False,
        )

    def reference_latents(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] as (B, 4, H / 8, W / 8), unscaled, as these editors were trained."""
        latents: Tensor = self.part["vae"].encode(pictures).latent_dist.mode()
        return latents

    def added_conditions(self, text: Text) -> dict[str, Tensor] | None:
        """Return what the UNet adds to the embedding of the timestep; None if it adds nothing."""
        return None

    def _start(self, reference: Tensor) -> tuple[int, Tensor]:
        """Return the training timestep and the noisy target latents (B, 4, H / 8, W / 8)."""
        t, scheduler = self.settings.timestep, self.part["scheduler"]
        timestep = round(t * (scheduler.config.num_train_timesteps - 1))
        noise = target_noise(reference.shape, reference)
        if t == 1.0:
            return timestep, noise
        current = reference * self.part["vae"].config.scaling_factor
        noisy: Tensor = scheduler.add_noise(current, noise, torch.tensor([timestep] * len(reference)))
        return timestep, noisy


def unet_layers(unet: UNet2DConditionModel, image_size: tuple[int, int], text: int) -> tuple[LayerSpec, ...]:
    """Return every attention layer of a diffusers UNet in call order.

    Self-attention holds the target at the resolution of its block, cross-attention the text.
    unet: may be on the meta device.
    """
    last = len(unet.config.block_out_channels) - 1
    paths = [name for name, module in unet.named_modules() if hasattr(module, "to_k")]
    halvings = {path: _halvings(path, last) for path in paths}
    stages = ("down_blocks", "mid_block", "up_blocks")
    layers = []
    # modules are registered as down, up, mid; a forward pass runs down, mid, up
    for path in sorted(paths, key=lambda path: stages.index(path.partition(".")[0])):
        module = unet.get_submodule(path)
        target = picture_segment("target", image_size, PIXELS_PER_LATENT * 2 ** halvings[path])
        layers.append(
            LayerSpec(
                name=path,
                block="sequential",
                heads=module.heads,
                kv_heads=module.heads,
                head_dim=module.to_k.out_features // module.heads,
                segments=(SegmentSpec(name="text", tokens=text) if path.endswith("attn2") else target,),
                by_instruction=path.endswith("attn2"),
            )
        )
    return tuple(layers)


def _halvings(path: str, last: int) -> int:
    """Return how often the latents were halved before the block of this module."""
    stage, _, rest = path.partition(".")
    if stage == "mid_block":
        return last
    block = int(rest.partition(".")[0])
    return block if stage == "down_blocks" else last - block

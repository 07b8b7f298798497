"""InstructPix2Pix on SDXL as an editor: the same step of a larger UNet, conditioned on two text encoders and sizes.

Text states are those of the second-to-last hidden layer of both encoders, side by side. The second encoder also returns
one vector for the whole text. The UNet's size conditions (arXiv 2307.01952, section 2.2) are (original height, width,
crop top, left, target height, width): the picture is not cropped, so both sizes are the image size and the crop is
(0, 0). Default size: 768 pixels, at which the editor was trained. Only the two lower resolutions have attention, with
16 and 32 pixels per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagewam_cli.plugin import Prompt, Text, UInt8Image
from imagewam_instruct_pix2pix.editor import InstructPix2PixEditor

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

_READERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class SdxlInstructPix2PixEditor(InstructPix2PixEditor):
    """A StableDiffusionXLInstructPix2PixPipeline folder as an `Editor`."""

    text_encoders = tuple(_READERS)

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        read = [self._read(prompt, *reader) for reader in _READERS.items()]
        return Prompt(states=torch.cat([r.hidden_states[-2][0] for r in read], dim=-1), pooled=read[-1].text_embeds[0])

    def _read(self, prompt: str, encoder: str, tokenizer: str) -> CLIPTextModelOutput:
        """Return one encoder's output. Like the pipeline, it does not mask padding: the encoders are causal, so no text
        token attends to it."""
        ids, _ = self.tokenized(prompt, tokenizer)
        output: CLIPTextModelOutput = self.part[encoder](ids, output_hidden_states=True)
        return output

    def reference_latents(self, pictures: Tensor) -> Tensor:
        vae = self.part["vae"]
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.float()  # SDXL's first VAE overflows in float16
        return super().reference_latents(pictures.to(vae.dtype)).to(self.dtype)

    def added_conditions(self, text: Text) -> dict[str, Tensor]:
        assert text.pooled is not None
        size = self.settings.image_size
        ids = torch.tensor([*size, 0, 0, *size], device=self.device, dtype=self.dtype)
        return {"text_embeds": text.pooled, "time_ids": ids.expand(len(text.pooled), -1)}

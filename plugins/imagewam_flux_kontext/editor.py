"""FLUX.1-Kontext as an editor: one forward pass of its joint transformer over T5 states and the reference picture.

Modes `prefix` (the default) and `denoise` both use timestep 1, where editing starts; `imagewam_cli.editors.joint` gives
the reasons. Target and reference have one timestep and attend to each other.

Kontext is guidance-distilled and takes the guidance scale as an input: `GUIDANCE`, the pipeline's default.

T5 encodes all 512 positions of a padded prompt, and the transformer attends to all of them (`keep`, the default). With
`trim` T5 encodes the same, and the states of the padding are dropped. All text has position id 0, so the remaining ids
do not change. The pooled vector is CLIP's for the prompt.

At the default size of 512 pixels a picture has 1024 tokens. Pretraining and the pipeline use a fixed list of sizes of
about one megapixel; here the user chooses the size, and pictures are not resized to one of that list.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from imagewam_cli.plugin import JointEditor, Prompt, SharedSize, Text, UInt8Image, picture_width, text_width

GUIDANCE = 3.5
"""Default `guidance_scale` of the pipeline."""


class FluxKontextEditor(JointEditor):
    """A FluxKontextPipeline folder as an `Editor`."""

    text_encoders = ("text_encoder", "text_encoder_2")
    text_tokenizer = "tokenizer_2"
    picture_ids = MappingProxyType({"target": 0, "reference": 1})
    text_moves = ()
    # text and target have id 0, the reference has 1; 2 is free, and as far from the reference as the target is
    action_id = 2

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        pooled = SharedSize(
            what="width of the pooled text",
            given=("text_encoder.hidden_size",),
            taken="transformer.pooled_projection_dim",
        )
        return text_width("text_encoder_2.d_model"), pooled, picture_width("vae.latent_channels")

    def fingerprint_extras(self) -> Mapping[str, object]:
        return {"guidance": GUIDANCE}

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        pooled = self.part["text_encoder"](self._padded("tokenizer", prompt)).pooler_output[0]
        ids = self._padded("tokenizer_2", prompt, self.entry.defaults.text_limit)
        states = self.part["text_encoder_2"](ids).last_hidden_state[0]
        return Prompt(states=states[: self.text_tokens(prompt)], pooled=pooled)

    def forward(self, image: Tensor, text: Text, mask: Tensor | None, **inputs: Tensor) -> None:
        guided = self.denoiser.config.guidance_embeds
        self.denoiser(
            hidden_states=image,
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            guidance=torch.full((len(image),), GUIDANCE, device=self.device) if guided else None,
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
            **inputs,
        )

    def _padded(self, tokenizer: str, prompt: str, length: int | None = None) -> Tensor:
        """Return token ids (1, length), padded. length: by default the tokenizer's own limit."""
        ids: Tensor = self.part[tokenizer](
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids.to(self.device)

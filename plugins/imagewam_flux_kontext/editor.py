"""FLUX.1-Kontext as an editor: one forward of its joint transformer over T5 states and the reference picture.

Modes `prefix`, the default, and `denoise`, both at timestep 1, where editing starts, for the reasons in
`imagewam_cli.editors.joint`: Kontext has one timestep for target and reference, and they see each other.

Kontext is distilled from guidance and takes its scale as an input: `GUIDANCE`, the pipeline's default.

Text: T5 sees all 512 positions of a padded prompt, and so does the transformer (`keep`, the default). With `trim` T5
sees the same, and the states of padding are dropped: text is not ordered by position ids (all are 0), so what remains
keeps its ids. The pooled vector is CLIP's of the prompt.

Default size 512 pixels: 1024 tokens. Pretraining and the pipeline use about one megapixel, in sizes of which each side
is a multiple of 16; the size of a picture is the user's here, and pictures are not moved to one of those sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from imagewam_cli.plugin import JointEditor, Prompt, Text, UInt8Image

GUIDANCE = 3.5
"""`guidance_scale` of the pipeline where the user gives none."""


class FluxKontextEditor(JointEditor):
    """A FluxKontextPipeline folder as an `Editor`."""

    text_encoders = ("text_encoder", "text_encoder_2")
    text_tokenizer = "tokenizer_2"
    picture_ids = MappingProxyType({"target": 0, "reference": 1})
    text_moves = ()
    # text is (0, 0, 0), which a target token has too, and pictures are 0 and 1: the next one is nobody's, and as far
    # from the reference as the reference is from the target
    action_id = 2

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
        """Token ids (1, length); None: as many as the tokenizer says."""
        ids = self.part[tokenizer](
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids.to(self.device)  # type: ignore[no-any-return]

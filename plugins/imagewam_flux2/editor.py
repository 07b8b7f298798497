"""FLUX.2-klein as an editor, run for one forward pass.

Modes:
- `prefix`: [text | reference] without a target, at the positions of the full sequence. Default timestep 0, at which the
  reference picture is clean; the published code uses it at inference.
- `denoise`: the pipeline's own step over [text | target | reference], in which all tokens attend to each other. Default
  timestep 1, where the pipeline starts from pure noise. No target is needed there, and the network infers the edit from
  picture and instruction alone, as a policy does. Below 1 the first reference picture, noised to that timestep,
  replaces the target. All segments are kept by default, because every token has attended to the noisy target and so
  differs from its counterpart in mode `prefix`.

The cameras are tiled into one reference picture, or each is a separate reference (`camera_layout`): the pipeline
accepts several. The text encoder is causal, so a row's states do not depend on the padding or on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from imagewam_cli.plugin import (
    GREY,
    ROUNDINGS,
    DiffusersEditor,
    LayerSpec,
    PrefixGraph,
    PrefixSettings,
    Prompt,
    PromptTokens,
    RopeSpec,
    SharedSize,
    Text,
    UInt8Image,
    flow_target,
    joint_layers,
    picture_width,
    text_width,
)
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.segments import picture_ids, picture_segments, text_segment
from imagewam_flux2.tokens import ACTION_T, FluxTokens, RoundedPositions

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel


class Flux2Editor(DiffusersEditor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    takes_text_token = True
    chat_tokenizers = ("tokenizer",)
    release = Flux2Release()

    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Hidden layers of the text encoder whose states, side by side, are the text states."""

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        text = text_width("text_encoder.hidden_size", times=len(cls.text_layers))
        return text, picture_width("vae.latent_channels")

    def prepare(self) -> None:
        rope = self.rounded_rope(self.denoiser, self.settings)
        if rope is not None and not ROUNDINGS[rope.rounding].exact:
            self.denoiser.pos_embed = RoundedPositions(rope)

    @classmethod
    def attention_layers(
        cls, denoiser: Flux2Transformer2DModel, settings: PrefixSettings, text: int
    ) -> tuple[LayerSpec, ...]:
        return joint_layers(denoiser, (text_segment(text), *picture_segments(settings)))

    @classmethod
    def rope(cls, denoiser: Flux2Transformer2DModel) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.config.rope_theta),
            action_axis=1,
            action_ids=(ACTION_T, 0, 0, 0),
        )

    def text_tokens(self, prompt: str) -> int:
        return self._padded or len(self.tokens.token_ids(prompt))

    def prompt_tokens(self, prompt: str) -> Mapping[str, PromptTokens]:
        return {"tokenizer": self.tokens.prompt_tokens(prompt)}

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        return Prompt(states=self.tokens.text([prompt], pad_to=self._padded).embeds[0])

    def run(self, pictures: Tensor, text: Text) -> None:
        timestep, segments = self.settings.timestep, picture_segments(self.settings)
        tokens = self.tokens.image(pictures, len(self.settings.reference_sizes))
        if self.settings.mode == "denoise":
            first = tokens[:, : segments[0].tokens]
            tokens = torch.cat([flow_target(first, timestep), tokens], dim=1)
        self.tokens.joint_forward(text, tokens, picture_ids(segments), timestep=timestep)

    def prefix_graph(self) -> PrefixGraph | None:
        """Return the graph; None in mode `denoise`, in which the editor itself runs alongside a policy's graphs."""
        if self.settings.mode == "denoise":
            return None
        return prefix_graph(
            self.tokens,
            self.settings,
            layers=self.layer_names,
            keep_segments=self.keep_segments,
            prompt=self.prompt,
            grey=GREY,
        )

    @property
    def tokens(self) -> FluxTokens:
        """Conversion of pictures and text to tokens, with the components that are currently loaded."""
        return FluxTokens(
            **{name: self.part.get(name) for name in self.entry.components},
            text_layers=self.text_layers,
            max_text_tokens=self.entry.defaults.text_limit,
            device=self.device,
        )

    @property
    def _padded(self) -> int | None:
        """Number of tokens to which every prompt is padded; None: no padding."""
        return self.tokens.max_text_tokens if self.settings.text_padding == "keep" else None

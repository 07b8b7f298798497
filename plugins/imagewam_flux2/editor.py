"""FLUX.2-klein as an editor, in one forward: the prefix of [text | reference], or a whole step of editing over [text |
target | reference].

Mode `prefix`, without a target. Default timestep 0: what the published code uses at inference (the reference picture is
clean). Text and reference have the positions of the full sequence.

Mode `denoise`, in which all tokens attend to each other, as in the pipeline's own step. Default timestep 1: there the
pipeline starts, from noise alone, so no target need be known, and what the network makes of those tokens it has from
picture and instruction, as a policy does. Below 1 the first reference picture stands for the target, noised to that
timestep. All segments are kept by default: each token has seen the noisy target, none is what it is in mode `prefix`.

The cameras are tiled into one reference picture, or are one each (`camera_layout`), as the pipeline takes several. The
text encoder is causal, so a row's states do not depend on padding, and states computed alone serve in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import PrefixGraph, PrefixSettings
from imagewam_cli.editors.defaults import EditorDefaults, ModeDefaults
from imagewam_cli.editors.diffusers import GREY, DiffusersEditor
from imagewam_cli.editors.target import flow_target
from imagewam_cli.editors.text import Prompt, Text
from imagewam_cli.editors.tokens import joint_layers, reference_sizes
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.segments import PIXELS_PER_TOKEN, picture_ids, picture_segments, text_segment
from imagewam_flux2.tokens import ACTION_T, FluxTokens, RoundedPositions


@dataclass(frozen=True, kw_only=True)
class FluxDefaults(EditorDefaults):
    """What a checkpoint of this family is used with unless the user says otherwise, and how it reads text."""

    text_layers: tuple[int, ...] = (9, 18, 27)


class Flux2Editor(DiffusersEditor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    takes_text_token = True
    release = Flux2Release()

    defaults: ClassVar[FluxDefaults] = FluxDefaults(
        modes={
            "prefix": ModeDefaults(timestep=0.0, has=("text", "reference"), keeps=("text", "reference")),
            "denoise": ModeDefaults(
                timestep=1.0, has=("text", "target", "reference"), keeps=("text", "target", "reference")
            ),
        },
        text_padding="keep",
        compute_dtype="bfloat16",
        camera_size=(512, 512),
        multiple=PIXELS_PER_TOKEN,
        max_text_tokens=512,
        camera_layouts=("tile", "separate", "head-over-wrists"),
        roundings=("exact", "published-bf16"),
    )

    def prepare(self) -> None:
        if self.settings.rounding == "published-bf16":
            self.denoiser.pos_embed = RoundedPositions(self.rope(self.denoiser))

    @staticmethod
    def part_classes() -> Mapping[str, Any]:
        from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
        from transformers import AutoTokenizer, Qwen3ForCausalLM

        return {
            "transformer": Flux2Transformer2DModel,
            "vae": AutoencoderKLFlux2,
            "text_encoder": Qwen3ForCausalLM,
            "tokenizer": AutoTokenizer,
        }

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        return joint_layers(denoiser, (text_segment(text), *picture_segments(settings)))

    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.config.rope_theta),
            action_axis=1,
            action_ids=(ACTION_T, 0, 0, 0),
        )

    def text_tokens(self, prompt: str) -> int:
        return self._padded or len(self.tokens.token_ids(prompt))

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        return Prompt(states=self.tokens.text([prompt], pad_to=self._padded).embeds[0])

    def run(self, pictures: Tensor, text: Text) -> None:
        timestep, segments = self.settings.timestep, picture_segments(self.settings)
        assert timestep is not None
        tokens = self.tokens.image(pictures, len(reference_sizes(self.settings)))
        if self.settings.mode == "denoise":
            first = tokens[:, : segments[0].tokens]
            tokens = torch.cat([flow_target(first, timestep), tokens], dim=1)
        self.tokens.joint_forward(text, tokens, picture_ids(segments), timestep=timestep)

    def prefix_graph(self) -> PrefixGraph | None:
        """None in mode `denoise`: the editor then runs live beside a policy's graphs."""
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
        """The parts that are loaded now, as they turn pictures and text into tokens."""
        return FluxTokens(
            **{name: self.part.get(name) for name in self.part_classes()},
            text_layers=self.defaults.text_layers,
            max_text_tokens=self.defaults.text_limit,
            device=self.device,
        )

    @property
    def _padded(self) -> int | None:
        """Every prompt has this many tokens; None: as many as it needs."""
        return self.tokens.max_text_tokens if self.settings.text_padding == "keep" else None

"""FLUX.2-klein as an editor: the prefix of [text | reference picture], one forward, no target.

Default timestep 0: what the published code uses at inference (the reference picture is clean). The prefix of one row is
computed with the positions that it has in the full sequence; all cameras are tiled into one reference picture. The text
encoder is causal, so a row's states do not depend on padding, and states computed alone serve in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.diffusers_editor import GREY, DiffusersEditor, joint_layers, picture_segment
from imagewam_cli.editor import PrefixGraph, PrefixSettings
from imagewam_cli.editor_defaults import EditorDefaults, ModeDefaults
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.kvcache.spec import LayerSpec, RopeSpec, SegmentSpec
from imagewam_cli.text_states import Prompt, Text
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, FluxTokens, RoundedPositions, image_ids

_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class FluxDefaults(EditorDefaults):
    """What a checkpoint of this family is used with unless the user says otherwise, and how it reads text."""

    text_layers: tuple[int, ...] = (9, 18, 27)


class Flux2Editor(DiffusersEditor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    takes_text_token = True
    release = Flux2Release()

    defaults: ClassVar[FluxDefaults] = FluxDefaults(
        modes={"prefix": ModeDefaults(timestep=0.0, has=("text", "reference"), keeps=("text", "reference"))},
        text_padding="keep",
        compute_dtype="bfloat16",
        camera_size=(512, 512),
        multiple=_PIXELS_PER_TOKEN,
        max_text_tokens=512,
        camera_layouts=("tile", "head-over-wrists"),
        roundings=("exact", "published-bf16"),
    )

    def __init__(
        self,
        entry: EditorEntry,
        settings: PrefixSettings,
        folder: Path,
        *,
        instructions: Sequence[str],
        device: str,
        tuned: Path | None = None,
    ) -> None:
        super().__init__(entry, settings, folder, instructions=instructions, device=device, tuned=tuned)
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
        assert settings.image_size is not None
        reference = picture_segment("reference", settings.image_size, _PIXELS_PER_TOKEN)
        return joint_layers(denoiser, (SegmentSpec(name="text", tokens=text), reference))

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
        assert self.settings.timestep is not None
        self.tokens.forward_prefix(
            text, self.tokens.image(pictures), image_ids(*self._grid, t=REFERENCE_T), timestep=self.settings.timestep
        )

    def prefix_graph(self) -> PrefixGraph:
        return prefix_graph(
            self.tokens,
            self.settings,
            layers=self.layer_names,
            grid=self._grid,
            keep_segments=self.keep_segments,
            prompt=self._prompt,
            grey=GREY,
        )

    @property
    def tokens(self) -> FluxTokens:
        """The parts that are loaded now, as they turn pictures and text into tokens."""
        return FluxTokens(
            **{name: self.part.get(name) for name in self.part_classes()},
            text_layers=self.defaults.text_layers,
            max_text_tokens=self.defaults.max_text_tokens,
        )

    @property
    def _padded(self) -> int | None:
        """Every prompt has this many tokens; None: as many as it needs."""
        return self.tokens.max_text_tokens if self.settings.text_padding == "keep" else None

    @functools.cached_property
    def _grid(self) -> tuple[int, int]:
        """Reference tokens: (rows, columns)."""
        assert self.settings.image_size is not None
        height, width = self.settings.image_size
        return height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN

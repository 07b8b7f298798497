"""FLUX.2-klein as an editor: the prefix of [text | reference picture], one forward, no target.

Default timestep 0: what the published code uses at inference (the reference picture is clean). The prefix of one row is
computed with the positions that it has in the full sequence; all cameras are tiled into one reference picture. The text
encoder is causal, so a row's states do not depend on padding, and states computed alone serve in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewam_cli.diffusers_editor import (
    GREY,
    DiffusersEditor,
    EditorDefaults,
    Text,
    load_parts,
    picture_segment,
)
from imagewam_cli.editor import PrefixGraph
from imagewam_cli.kvcache.spec import LayerSpec, RopeSpec, SegmentSpec
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, FluxTokens, image_ids

_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class FluxDefaults(EditorDefaults):
    """What a checkpoint of this family is used with unless the user says otherwise, and how it reads text."""

    text_layers: tuple[int, ...] = (9, 18, 27)
    max_text_tokens: int = 512


class Flux2Editor(DiffusersEditor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    learned = ("transformer", "text_encoder")
    defaults: ClassVar[FluxDefaults] = FluxDefaults(
        mode="prefix",
        timestep=0.0,
        segments=("text", "reference"),
        available={"prefix": ("text", "reference")},
        text_padding="keep",
        compute_dtype="bfloat16",
        camera_size=(512, 512),
        multiple=_PIXELS_PER_TOKEN,
    )

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

    @property
    def denoiser(self) -> nn.Module:
        transformer: nn.Module = self._tokens.transformer
        return transformer

    def attention_layers(self, text: int) -> tuple[LayerSpec, ...]:
        assert self.settings.image_size is not None
        config = self._tokens.transformer.config
        reference = picture_segment("reference", self.settings.image_size, _PIXELS_PER_TOKEN)
        return tuple(
            LayerSpec(
                name=name,
                block="sequential" if i < config.num_layers else "parallel",
                heads=config.num_attention_heads,
                kv_heads=config.num_attention_heads,
                head_dim=config.attention_head_dim,
                segments=(SegmentSpec(name="text", tokens=text), reference),
            )
            for i, name in enumerate(self._tokens.layers)
        )

    @property
    def rope(self) -> RopeSpec:
        config = self._tokens.transformer.config
        return RopeSpec(
            axes=tuple(config.axes_dims_rope),
            theta=float(config.rope_theta),
            action_axis=1,
            action_ids=(ACTION_T, 0, 0, 0),
        )

    def embed(self, prompt: str) -> Tensor:
        keep = self.settings.text_padding == "keep"
        return self._tokens.text([prompt], pad_to=self._tokens.max_text_tokens if keep else None).embeds[0]

    def run(self, pictures: Tensor, text: Text) -> None:
        assert self.settings.timestep is not None
        self._tokens.forward_prefix(
            text, self._tokens.image(pictures), image_ids(*self._grid, t=REFERENCE_T), timestep=self.settings.timestep
        )

    def prefix_graph(self) -> PrefixGraph:
        return prefix_graph(
            self._tokens,
            self.settings,
            layers=self.layer_names,
            grid=self._grid,
            keep_segments=self.keep_segments,
            prompt=self._prompt,
            grey=GREY,
        )

    @classmethod
    def load_tokens(cls, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FluxTokens:
        """The parts of a pipeline folder as they turn pictures and text into tokens; see `load_parts` for the
        errors."""
        return cls._tokens_of(load_parts(folder, cls.part_classes(), "Flux2KleinPipeline", device, dtype))

    @classmethod
    def _tokens_of(cls, parts: Mapping[str, Any]) -> FluxTokens:
        return FluxTokens(text_layers=cls.defaults.text_layers, max_text_tokens=cls.defaults.max_text_tokens, **parts)

    @functools.cached_property
    def _tokens(self) -> FluxTokens:
        return self._tokens_of(self.part)

    @functools.cached_property
    def _grid(self) -> tuple[int, int]:
        """Reference tokens: (rows, columns)."""
        assert self.settings.image_size is not None
        height, width = self.settings.image_size
        return height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN

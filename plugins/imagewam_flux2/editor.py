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
from typing import Any

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
from imagewam_cli.editor import PrefixGraph, PrefixSettings
from imagewam_cli.fetch import downloaded
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.kvcache.spec import LayerSpec, RopeSpec, SegmentSpec
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, FluxTokens, image_ids

_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class FluxDefaults(EditorDefaults):
    """What a checkpoint of this family is used with unless the user says otherwise, and how it reads text."""

    text_layers: tuple[int, ...] = (9, 18, 27)
    max_text_tokens: int = 512


DEFAULTS = FluxDefaults(
    mode="prefix",
    timestep=0.0,
    segments=("text", "reference"),
    available={"prefix": ("text", "reference")},
    text_padding="keep",
    compute_dtype="bfloat16",
    camera_size=(512, 512),
    multiple=_PIXELS_PER_TOKEN,
)


def load(
    entry: EditorEntry,
    settings: PrefixSettings,
    *,
    instructions: Sequence[str],
    weights: Path | None = None,
    device: str = "cpu",
) -> Flux2Editor:
    """An `imagewam_cli.editor.EditorLoader` for the checkpoints on the Hub."""
    folder = weights if weights is not None else downloaded(entry)
    return Flux2Editor(entry, settings, DEFAULTS, folder, instructions=instructions, device=device)


class Flux2Editor(DiffusersEditor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    learned = ("transformer", "text_encoder")

    def __init__(
        self,
        entry: EditorEntry,
        settings: PrefixSettings,
        defaults: FluxDefaults,
        folder: Path,
        *,
        instructions: Sequence[str],
        device: str,
    ) -> None:
        self._defaults = defaults
        super().__init__(entry, settings, defaults, folder, instructions=instructions, device=device)

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
            layers=[layer.name for layer in self.spec.layers],
            grid=self._grid,
            keep_segments=self.keep_segments,
            prompt=self._prompt,
            grey=GREY,
        )

    @functools.cached_property
    def _tokens(self) -> FluxTokens:
        return _tokens(self.part, self._defaults)

    @functools.cached_property
    def _grid(self) -> tuple[int, int]:
        """Reference tokens: (rows, columns)."""
        assert self.settings.image_size is not None
        height, width = self.settings.image_size
        return height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN


def load_tokens(folder: Path, defaults: FluxDefaults, device: str, dtype: torch.dtype) -> FluxTokens:
    """The parts of a pipeline folder as they turn pictures and text into tokens; see `load_parts` for the errors."""
    return _tokens(load_parts(folder, Flux2Editor.part_classes(), "Flux2KleinPipeline", device, dtype), defaults)


def _tokens(parts: Mapping[str, Any], defaults: FluxDefaults) -> FluxTokens:
    return FluxTokens(text_layers=defaults.text_layers, max_text_tokens=defaults.max_text_tokens, **parts)

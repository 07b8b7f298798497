"""FLUX.2's prefix as a traceable module: picture and token ids in, keys and values out, equal to `Flux2Editor.encode`.

`torch.export` traces it in non-strict mode, which runs `capture.record` as ordinary Python. Two things differ from the
editor's own forward pass. The attention mask is always passed, because a graph cannot branch on whether a row is
padded. The forward pass is not stopped after the last kept layer, because the tracer could not follow that; unused
computation drops out of the graph anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from imagewam_cli.plugin import ExportError, LayerKV, PrefixGraph, PrefixKV, PrefixSettings, record
from imagewam_flux2.segments import picture_ids, picture_segments
from imagewam_flux2.tokens import FluxTokens, text_ids

KeepSegments = Callable[[Mapping[str, LayerKV], Tensor], PrefixKV]
"""(layers, text_valid bool (B, L)) -> the kept segments, with K and V zero at invalid tokens."""

_PROBES = ("put the red block on the blue zone", "  Put\tit {there}, 2 cm  left?  ", "x")


class Flux2Prefix(nn.Module):
    """forward(image, token_ids, token_valid) -> ([valid,] k_0, v_0, ...), as specified by `PrefixGraph.module`."""

    def __init__(
        self,
        tokens: FluxTokens,
        layers: Sequence[str],
        settings: PrefixSettings,
        keep_segments: KeepSegments,
    ) -> None:
        """layers: names of the attention modules to keep; settings: of mode `prefix`."""
        super().__init__()
        self.transformer, self.vae, self.text_encoder = tokens.transformer, tokens.vae, tokens.text_encoder.model
        self._tokens, self._layers, self._keep_segments = tokens, list(layers), keep_segments
        self._timestep, self._keep_padding = settings.timestep, settings.text_padding == "keep"
        self._references, self._pictures = len(settings.reference_sizes), picture_segments(settings)

    def forward(self, image: Tensor, token_ids: Tensor, token_valid: Tensor) -> tuple[Tensor, ...]:
        """image: float32 (B, 3, H, W) in [-1, 1]; token_ids: int64 (B, L); token_valid: bool (B, L)."""
        batch, length = token_ids.shape
        reference = self._tokens.image(image, self._references)
        embeds = self._tokens.hidden_states(token_ids, token_valid)
        text_valid = torch.ones_like(token_valid) if self._keep_padding else token_valid
        valid = torch.cat([text_valid, text_valid.new_ones(batch, reference.shape[1])], dim=1)
        with record(self.transformer, self._layers) as recording:
            self.transformer(
                hidden_states=reference,
                encoder_hidden_states=embeds,
                timestep=image.new_full((batch,), self._timestep),
                img_ids=picture_ids(self._pictures),
                txt_ids=text_ids(length),
                guidance=None,
                joint_attention_kwargs={"attention_mask": valid[:, None, None, :]},
                return_dict=False,
            )
        prefix = self._keep_segments(recording.layers, text_valid)
        mask = () if prefix.valid is None else (prefix.valid,)
        return *mask, *(x for kv in prefix.layers for x in (kv.k, kv.v))


def prefix_graph(
    tokens: FluxTokens,
    settings: PrefixSettings,
    *,
    layers: Sequence[str],
    keep_segments: KeepSegments,
    prompt: Callable[[str], str],
    grey: int,
) -> PrefixGraph:
    """Return the graph of the prefix and how to prepare its inputs.

    prompt: converts an instruction to the user message of the chat template; grey: pixel value of a blank picture.

    Raises:
        ExportError: the cameras are not in one row, or the template does more than enclose the instruction.
    """
    if not settings.layout.in_one_row:  # `PrefixGraph` composes its picture from cameras side by side
        raise ExportError(
            f"the camera layout {settings.camera_layout!r} cannot be exported: a graph needs cameras side by side",
            "train on a cache that was built with --camera-layout tile",
        )
    before, after = _frame(tokens, prompt)
    return PrefixGraph(
        module=Flux2Prefix(tokens, layers, settings, keep_segments),
        tokenizer=_tokenizer_json(tokens),
        before=before,
        after=after,
        pad_id=int(tokens.tokenizer.pad_token_id),
        max_tokens=tokens.max_text_tokens,
        pad_to=tokens.max_text_tokens if settings.text_padding == "keep" else None,
        cameras=settings.cameras,
        image_size=settings.image_size,
        grey=grey if settings.blank_images else None,
    )


def _frame(tokens: FluxTokens, prompt: Callable[[str], str]) -> tuple[str, str]:
    """Return the template's text before and after an instruction, after a check against `FluxTokens.token_ids`."""
    from tokenizers import Tokenizer

    before, found, after = tokens.chat(prompt(_PROBES[0])).partition(_PROBES[0])
    tokenizer = Tokenizer.from_str(_tokenizer_json(tokens))
    same = (
        tokenizer.encode(before + probe + after).ids[: tokens.max_text_tokens] == tokens.token_ids(prompt(probe))
        for probe in _PROBES
    )
    if not found or not all(same):
        raise ExportError("the chat template does more than add fixed text before and after the instruction")
    return before, after


def _tokenizer_json(tokens: FluxTokens) -> str:
    """Return the tokenizer as JSON, without the padding and truncation of its last call."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokens.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text: str = tokenizer.to_str()
    return text

"""FLUX.2's prefix as a traceable module: picture and token ids in, keys and values out, equal to `Flux2Editor.encode`.

Traced by `torch.export` without strict mode, which follows `capture.record` as it follows any Python. Two things
differ from the editor's own forward: the attention mask is always passed (a graph cannot look whether a row is padded),
and the forward is not left early (that confuses the tracer; what follows the last layer drops out of the graph anyway).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from imagewam_cli.plugin import ExportError, LayerKV, PrefixGraph, PrefixKV, PrefixSettings, record
from imagewam_flux2.segments import picture_ids, picture_segments
from imagewam_flux2.tokens import FluxTokens, text_ids

KeepSegments = Callable[[Mapping[str, LayerKV], Tensor], PrefixKV]
"""(layers, which text tokens are valid (B, L)) -> the segments that count, invalid tokens zeroed."""

_PROBES = ("put the red block on the blue zone", "  Put\tit {there}, 2 cm  left?  ", "x")


class Flux2Prefix(nn.Module):
    """forward(image, token_ids, token_valid) -> (valid, k_0, v_0, ...), as `PrefixGraph` asks."""

    def __init__(
        self,
        tokens: FluxTokens,
        layers: Sequence[str],
        settings: PrefixSettings,
        keep_segments: KeepSegments,
    ) -> None:
        """layers: attention modules to keep; settings: resolved, mode `prefix`."""
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
    """The module with the recipe of its inputs.

    settings: with every None resolved; prompt: instruction -> what the chat template gets; grey: of a blank picture.

    Raises:
        ExportError: the cameras do not stand side by side, or the template does more than frame the instruction.
    """
    if not settings.layout.in_one_row:  # the recipe of a graph's inputs sets cameras side by side
        raise ExportError(f"the camera layout {settings.camera_layout!r} is not part of the graph's recipe")
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
    """What the chat template sets before and after an instruction, checked against `FluxTokens.token_ids`."""
    from tokenizers import Tokenizer

    before, found, after = tokens.chat(prompt(_PROBES[0])).partition(_PROBES[0])
    tokenizer = Tokenizer.from_str(_tokenizer_json(tokens))
    same = (
        tokenizer.encode(before + probe + after).ids[: tokens.max_text_tokens] == tokens.token_ids(prompt(probe))
        for probe in _PROBES
    )
    if not found or not all(same):
        raise ExportError("the chat template does more than put fixed text around the instruction")
    return before, after


def _tokenizer_json(tokens: FluxTokens) -> str:
    """The tokenizer alone, without the padding and truncation of its last call."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokens.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text: str = tokenizer.to_str()
    return text

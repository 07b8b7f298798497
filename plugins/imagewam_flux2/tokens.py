"""Tokens of FLUX.2: pictures, text, positions and timesteps, on diffusers' own classes.

Picture -> VAE mean -> 2x2 space-to-channel -> batch norm -> tokens (B, h w, C). Instruction -> chat template ->
hidden states of three Qwen3 layers side by side -> (B, L, 3 D). Position ids have four axes (t, h, w, l): text counts
along l; reference pictures have t = 10, 20, ..., the target t = 0, actions t = 2 and count along h. Source: arXiv
2606.19531, FLUX.2 stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewam_cli.plugin import (
    EditorError,
    LayerKV,
    PromptTokens,
    RopeSpec,
    Text,
    grid_ids,
    joint_layers,
    prompt_tokens,
    record,
    replay,
    rotary_tables,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

REFERENCE_T = 10
"""Position id t of the first reference picture. The second has twice this id, and so on."""
TARGET_T = 0
ACTION_T = 2


@dataclass(frozen=True, kw_only=True)
class FluxPrefix:
    """Keys and values of the tokens [text | reference], by attention module. valid: bool (B, P).

    output: the denoiser's output at the reference tokens, (B, R, C); None if the forward pass was stopped before it.
    """

    layers: dict[str, LayerKV]
    valid: Tensor
    output: Tensor | None = None

    def repeat(self, times: int) -> FluxPrefix:
        """Return the batch repeated as a whole."""
        layers = {n: LayerKV(kv.k.repeat(times, 1, 1, 1), kv.v.repeat(times, 1, 1, 1)) for n, kv in self.layers.items()}
        return FluxPrefix(layers=layers, valid=self.valid.repeat(times, 1))


@dataclass(frozen=True, kw_only=True)
class FluxTokens:
    """Parts of a FLUX.2-klein pipeline, used to compute the prefix of a (picture, instruction) pair and to decode
    pictures."""

    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2
    text_encoder: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    text_layers: tuple[int, ...] = (9, 18, 27)
    max_text_tokens: int = 512
    device: torch.device | None = None
    """Device on which the text encoder computes, if its weights are offloaded."""

    @classmethod
    def from_pipeline(
        cls, pipeline: Flux2KleinPipeline, *, text_layers: tuple[int, ...] = (9, 18, 27), max_text_tokens: int = 512
    ) -> FluxTokens:
        """Return the parts of a loaded pipeline."""
        return cls(
            transformer=pipeline.transformer,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            text_layers=text_layers,
            max_text_tokens=max_text_tokens,
        )

    def image(self, pictures: Tensor, count: int = 1) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] as normalized tokens (B, H W / 256, C), in row order.

        count: number of pictures of equal width, side by side. Each is encoded separately.
        """
        with torch.no_grad():
            return torch.cat([self._encode(picture) for picture in pictures.chunk(count, dim=3)], dim=1)

    def _encode(self, pictures: Tensor) -> Tensor:
        latents = F.pixel_unshuffle(self.vae.encode(pictures).latent_dist.mode(), 2)
        mean, std = self._batch_norm(latents)
        return ((latents - mean) / std).flatten(2).transpose(1, 2)

    def picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Decode tokens of a grid of height x width as (B, 3, 16 height, 16 width), clamped to [-1, 1]; the inverse of
        `image`."""
        with torch.no_grad():
            latents = tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)
            mean, std = self._batch_norm(latents)
            decoded: Tensor = self.vae.decode(F.pixel_shuffle(latents * std + mean, 2)).sample
            return decoded.clamp(-1, 1)

    def chat(self, instruction: str) -> str:
        """Return the instruction in the chat template."""
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return text

    def token_ids(self, instruction: str) -> list[int]:
        """Return the token ids of the instruction in the chat template, truncated to `max_text_tokens`."""
        return list(self.prompt_tokens(instruction).ids)

    def prompt_tokens(self, instruction: str) -> PromptTokens:
        """Return the tokens of the instruction in the chat template, and the end that `max_text_tokens` cuts off."""
        text = self.chat(instruction)
        after = text[text.rindex(instruction) + len(instruction) :] if instruction in text else ""
        return prompt_tokens(self.tokenizer, text, self.max_text_tokens, after=after)

    def text(self, instructions: Sequence[str], *, pad_to: int | None = None, grad: bool = False) -> Text:
        """Return the states of the instructions, padded at the end to the longest of them and to at least `pad_to`."""
        rows = [self.token_ids(i) for i in instructions]
        length = max(pad_to or 0, *(len(r) for r in rows))
        device = self.device or self.text_encoder.device
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        valid = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            valid[i, : len(row)] = True
        ids, valid = ids.to(device), valid.to(device)
        with contextlib.nullcontext() if grad else torch.no_grad():
            return Text(embeds=self.hidden_states(ids, valid), valid=valid)

    def hidden_states(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Return the states of the text layers side by side, (B, L, 3 D), of ids int64 (B, L) and valid bool (B, L)."""
        # `.model` skips the language head, which is not needed
        states = self.text_encoder.model(
            input_ids=ids, attention_mask=valid.long(), output_hidden_states=True, use_cache=False
        ).hidden_states
        if max(self.text_layers) >= len(states):
            raise EditorError(
                f"the text encoder has {len(states) - 1} layers, but layer {max(self.text_layers)} is read",
                "pass a folder whose text encoder belongs to the transformer",
            )
        return torch.cat([states[i] for i in self.text_layers], dim=-1)

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules in the order in which they run: double blocks, then single blocks."""
        return [layer.name for layer in joint_layers(self.transformer, ())]

    def prefix(
        self,
        text: Text,
        reference: Tensor,
        reference_ids: Tensor,
        *,
        timestep: float | Tensor,
        layers: Sequence[str] | None = None,
        grad: bool = False,
    ) -> FluxPrefix:
        """Run one forward pass over [text | reference] without a target. Text and reference attend to each other;
        padding is masked.

        reference: (B, R, C); reference_ids: (R, 4); timestep: in [0, 1], one for all rows or one per row (B,); layers:
        attention modules to record, by default all.
        """
        names = list(layers) if layers is not None else self.layers
        with (
            contextlib.nullcontext() if grad else torch.no_grad(),
            record(self.transformer, names, stop_after_last=not grad) as recording,
        ):
            output = self.joint_forward(text, reference, reference_ids, timestep=timestep)
        valid = _with_pictures(text, reference)
        return FluxPrefix(layers=recording.layers, valid=valid, output=output if grad else None)

    def joint_forward(self, text: Text, pictures: Tensor, picture_ids: Tensor, *, timestep: float | Tensor) -> Tensor:
        """Run one forward pass over [text | pictures], in which all tokens except padding attend to each other.

        pictures: (B, I, C), tokens of references, after those of a noisy target if any; picture_ids: (I, 4).
        Returns the denoiser's output at the pictures' tokens, (B, I, C).
        """
        batch, length = text.valid.shape
        mask = _key_mask(_with_pictures(text, pictures))
        t = torch.as_tensor(timestep, dtype=torch.float32).expand(batch)
        return self._forward(text.embeds, pictures, text_ids(length), picture_ids, t, mask)

    def target_velocity(
        self, prefix: FluxPrefix, noisy: Tensor, t: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the velocity of noisy target tokens (B, T, C) at noise levels t (B,), which attend to the prefix.

        grid: numbers of (rows, columns) of the tokens, by default a square.
        """
        batch, count, _ = noisy.shape
        rows, columns = grid or (round(count**0.5),) * 2
        empty = noisy.new_zeros(batch, 0, self.transformer.config.joint_attention_dim)
        with replay(self.transformer, prefix.layers, prefix.valid):
            return self._forward(empty, noisy, text_ids(0), image_ids(rows, columns, t=TARGET_T), t, None)

    def _forward(
        self, embeds: Tensor, image: Tensor, txt_ids: Tensor, img_ids: Tensor, t: Tensor, mask: Tensor | None
    ) -> Tensor:
        kwargs = None if mask is None else {"attention_mask": mask}
        output: Tensor = self.transformer(
            hidden_states=image,
            encoder_hidden_states=embeds.to(image.dtype),
            timestep=t.to(image.device),
            img_ids=img_ids.to(image.device),
            txt_ids=txt_ids.to(image.device),
            guidance=None,
            joint_attention_kwargs=kwargs,
            return_dict=False,
        )[0]
        return output

    def _batch_norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(like)
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(like)
        return mean, std


class RoundedPositions(nn.Module):
    """Replacement of the transformer's `pos_embed` that rounds its angles according to `rope.rounding`."""

    def __init__(self, rope: RopeSpec) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, float32 (T, D), of position ids (T, axes). Each value is repeated for its pair."""
        cos, sin = rotary_tables(ids, self.rope.axes, self.rope.theta, self.rope.rounding)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def image_ids(height: int, width: int, *, t: int) -> Tensor:
    """Return the position ids of a grid of picture tokens, float32 (height * width, 4), in row order."""
    return F.pad(grid_ids(t, height, width), (0, 1))


def text_ids(length: int) -> Tensor:
    """Return the position ids of `length` text tokens, float32 (length, 4)."""
    ids = torch.zeros(length, 4)
    ids[:, 3] = torch.arange(length)
    return ids


def _with_pictures(text: Text, pictures: Tensor) -> Tensor:
    """Return bool (B, L + I), False at the padding of [text | pictures]."""
    return torch.cat([text.valid, text.valid.new_ones(pictures.shape[:2])], dim=1)


def _key_mask(valid: Tensor) -> Tensor | None:
    """Return the attention mask bool (B, 1, 1, P), or None if every token is valid."""
    return None if bool(valid.all()) else valid[:, None, None, :]

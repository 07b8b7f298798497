"""Compute the keys and values of a joint transformer without imagewam.

Uses hooks on the model's own projections and norms, and diffusers' own rotation. Works for transformers with the
structure of FLUX.1: double blocks that project text separately, and single blocks that do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn


class Observer:
    """Record the inputs of a transformer's last forward, and the keys and values of its layers."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.inputs: dict[str, Any] = {}
        self._seen: dict[str, Tensor] = {}
        transformer.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        for name, module in transformer.named_modules():
            if name.endswith((".norm_k", ".norm_added_k", ".to_v", ".add_v_proj")):
                module.register_forward_hook(lambda _m, _a, out, name=name: self._seen.update({name: out}))

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        self.inputs = kwargs

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return rotated k and v of each layer in the last forward, each (B, text + images, H, D)."""
        ids = torch.cat([self.inputs["txt_ids"], self.inputs["img_ids"]])
        rotation = self.transformer.pos_embed(ids)
        names = [name.removesuffix(".norm_k") for name in self._seen if name.endswith(".norm_k")]
        found = []
        for name in names:
            k, v = self._seen[f"{name}.norm_k"], self._seen[f"{name}.to_v"]
            if f"{name}.norm_added_k" in self._seen:
                k = torch.cat([self._seen[f"{name}.norm_added_k"], k], dim=1)
                v = torch.cat([self._seen[f"{name}.add_v_proj"], v], dim=1)
            found.append((apply_rotary_emb(k, rotation, sequence_dim=1), v.unflatten(-1, k.shape[2:])))
        return found


@contextlib.contextmanager
def attention_mask(mask: Tensor) -> Iterator[None]:
    """Apply `mask` (queries, keys) to every attention in the block."""
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def masked(*args: Any, **kwargs: Any) -> Tensor:
        assert kwargs.get("attn_mask") is None
        return attend(*args, **{**kwargs, "attn_mask": mask})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        yield


def prefix_mask(text: int, target: int, reference: int) -> Tensor:
    """Return a mask, bool (P, P) over [text | target | reference], in which only the target sees the target."""
    is_target = torch.tensor([False] * text + [True] * target + [False] * reference)
    return ~is_target[None, :] | is_target[:, None]


def largest_difference(prefix: Any, expected: list[tuple[Tensor, Tensor]], tokens: list[int] | slice) -> float:
    """Return the largest difference between k and v of `prefix` and `tokens` of the expected ones, over all layers."""
    assert len(prefix.layers) == len(expected)
    differences = []
    for kv, pair in zip(prefix.layers, expected, strict=True):
        for mine, theirs in zip((kv.k, kv.v), pair, strict=True):
            assert mine.shape == theirs[:, tokens].shape
            differences.append((mine - theirs[:, tokens]).abs().max().item())
    return max(differences)

"""Conversion of FLUX.2's weights between the names of the release and of diffusers' `Flux2Transformer2DModel`.

Names map one to one with two exceptions. The release fuses q, k and v of a double block; diffusers does not. The two
halves of the final layer's modulation are swapped (the release has shift, then scale).

Source: arXiv 2606.19531's code and FLUX.2's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_FINAL = ("final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight")
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


class Flux2Release:
    """Implementation of `imagewam_cli.plugin.ReleaseNames`."""

    def from_release(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return diffusers' state dict of weights under released names. Unknown names are kept."""
        state: dict[str, Tensor] = {}
        for name, value in weights.items():
            targets = _targets(name)
            parts = value.chunk(len(targets)) if len(targets) > 1 else (value,)
            state |= zip(targets, parts, strict=True)
        if _FINAL[1] in state:
            state[_FINAL[1]] = _swap_halves(state[_FINAL[1]])
        return state

    def to_release(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under their released names, the inverse of `from_release`."""
        weights = {}
        for name in _released(state):
            targets = _targets(name)
            weights[name] = torch.cat([state[t] for t in targets]) if len(targets) > 1 else state[targets[0]]
        if _FINAL[0] in weights:
            weights[_FINAL[0]] = _swap_halves(weights[_FINAL[0]])
        return weights

    def sizes(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the dimensions that differ between sizes of the model, judged from the tensors present."""
        blocks = {(m[1], m[2]) for m in (re.match(r"(double|single)_blocks\.(\d+)\.", n) for n in weights) if m}
        dimensions = {f"{kind} blocks": sum(k == kind for k, _ in blocks) for kind in ("double", "single")}
        for key, name, axis in (
            ("hidden channels", "img_in.weight", 0),
            ("latent channels", "img_in.weight", 1),
            ("text channels", "txt_in.weight", 1),
            ("numbers in a head", "single_blocks.0.norm.key_norm.scale", 0),
        ):
            if name in weights:
                dimensions[key] = weights[name].shape[axis]
        return dimensions


def _targets(name: str) -> tuple[str, ...]:
    """Return diffusers' names of a released tensor: three names if the release fuses q, k and v in it."""
    if name == _FINAL[0]:
        return (_FINAL[1],)
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return (f"{_TOP[module]}.{leaf}",)
    block = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", module)
    if block is None:
        return (name,)
    home = f"{_BLOCKS[block[1]]}.{block[2]}"
    double = block[1] == "double_blocks"
    inner = block[3]
    if leaf == "scale":
        norms = _DOUBLE_NORMS if double else _SINGLE_NORMS
        return (f"{home}.{norms[inner]}.weight",) if inner in norms else (name,)
    if double and inner in _FUSED:
        return tuple(f"{home}.{part}.{leaf}" for part in _FUSED[inner])
    names = _DOUBLE if double else _SINGLE
    return (f"{home}.{names[inner]}.{leaf}",) if inner in names else (name,)


def _released(state: Mapping[str, Tensor]) -> list[str]:
    """Return the released names of the tensors of a diffusers state dict."""
    names = [f"{module}.weight" for module in _TOP] + [_FINAL[0]]
    for kind, home in _BLOCKS.items():
        double = kind == "double_blocks"
        linears = (*_DOUBLE, *_FUSED) if double else tuple(_SINGLE)
        norms = _DOUBLE_NORMS if double else _SINGLE_NORMS
        for i in sorted({int(name.split(".")[1]) for name in state if name.startswith(f"{home}.")}):
            names += [f"{kind}.{i}.{linear}.weight" for linear in linears]
            names += [f"{kind}.{i}.{norm}.scale" for norm in norms]
    return [name for name in names if _targets(name)[0] in state]


def _swap_halves(weight: Tensor) -> Tensor:
    first, second = weight.chunk(2)
    return torch.cat([second, first])

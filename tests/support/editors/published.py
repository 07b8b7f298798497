"""Load three layers of the tiny editor that the published code's reference numbers were computed with."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from imagewam_cli.editors.contract import TextToken, TokenPlacement
from imagewam_cli.editors.text import Text, with_token
from imagewam_cli.prefix.kv import LayerKV
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import REFERENCE_T, FluxPrefix, FluxTokens, image_ids
from tests.support.paths import FIXTURES

PUBLISHED = FIXTURES / "published"
NAMES = ("double.0", "single.0", "single.1")
GRID = (4, 6)
Case = dict[str, Tensor]


def case(name: str) -> Case:
    """Load the inputs and the published outputs of one case."""
    found: Case = load_file(PUBLISHED / f"{name}.safetensors")
    return found


def released() -> dict[str, Tensor]:
    """Return the editor's weights by released names, with two single blocks. Weights missing from the fixture are 0."""
    weights = {name: value for name, value in case("editor").items() if not name.startswith("proprio")}
    hidden, mlp = weights["img_in.weight"].shape[0], weights["single_blocks.0.linear1.weight"].shape[0]
    qkv = weights["single_blocks.1.linear1.weight"]
    weights["single_blocks.1.linear1.weight"] = F.pad(qkv, (0, 0, 0, mlp - len(qkv)))
    weights["single_blocks.1.linear2.weight"] = torch.zeros_like(weights["single_blocks.0.linear2.weight"])
    weights["final_layer.linear.weight"] = torch.zeros(128, hidden)
    weights["final_layer.adaLN_modulation.1.weight"] = torch.zeros(2 * hidden, hidden)
    return weights


def transformer() -> Any:
    from diffusers import Flux2Transformer2DModel

    sizes = json.loads((PUBLISHED / "config.json").read_text())
    model = Flux2Transformer2DModel(
        in_channels=sizes["in_channels"],
        num_layers=sizes["depth"],
        num_single_layers=2,
        attention_head_dim=sizes["head_dim"],
        num_attention_heads=sizes["num_heads"],
        joint_attention_dim=sizes["context_in_dim"],
        mlp_ratio=sizes["mlp_ratio"],
        axes_dims_rope=tuple(sizes["axes_dim"]),
        rope_theta=sizes["theta"],
        guidance_embeds=False,
    )
    model.load_state_dict(Flux2Release().from_release(released()), strict=True)
    return model.eval().requires_grad_(False)


def tokens(model: Any) -> FluxTokens:
    return FluxTokens(transformer=model, vae=None, text_encoder=None, tokenizer=None)


def text(given: Case, placement: TokenPlacement, dtype: torch.dtype = torch.float32) -> Text:
    """Return the text states of the case, with the token of its robot state inserted."""
    weights = case("editor")
    weight, bias = weights["proprio_encoder.weight"].to(dtype), weights["proprio_encoder.bias"].to(dtype)
    vectors = F.linear(given["in.proprio"].to(dtype), weight, bias)
    states = Text(embeds=given["in.context"].to(dtype), valid=given["in.context_mask"])
    return with_token(states, TextToken(vectors=vectors, placement=placement, text_tokens=states.valid.shape[1]))


def prefix(model: Any, given: Case, placement: TokenPlacement) -> FluxPrefix:
    reference = given["ref.tokens"]
    ids = image_ids(*GRID, t=REFERENCE_T)
    return tokens(model).prefix(text(given, placement, reference.dtype), reference, ids, timestep=0.0)


def kv_error(given: Case, found: FluxPrefix) -> float:
    """Return the largest difference from the keys and values of the case, over its layers."""
    layers: dict[str, LayerKV] = dict(zip(NAMES, found.layers.values(), strict=True))
    errors = [
        (getattr(kv, part).flatten(2).float() - given[f"cache.{name}.{part}"].float()).abs().max()
        for name, kv in layers.items()
        for part in "kv"
        if f"cache.{name}.{part}" in given
    ]
    return float(torch.stack(errors).max())

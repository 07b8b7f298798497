"""Initialize the expert from the editor: take the tensors of the same name and resize them by linear interpolation.

published: the method of the published code (arXiv 2606.19531, `preprocess_action_dit_flux2`). Each fused axis is
    resized as a whole. In parallel blocks this mixes parts, because only the MLP shrinks: queries come from the
    editor's queries and keys, keys from its queries, keys and values, and values from its MLP. The head gets PyTorch's
    default weights.
repaired: each part of a fused axis is resized separately. The head stays zero, so training starts at velocity zero.

In both, the encoders keep their own initial weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewam_cli.errors import EditorError
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.prefix.spec import LayerSpec

Initialization = Literal["none", "published", "repaired"]

_FROM_EDITOR = (
    "time_in.",
    "double_stream_modulation_img.",
    "single_stream_modulation.",
    "double_blocks.",
    "single_blocks.",
)
_EQUAL_PARTS = {
    ("linear1", 0): 2,
    ("img_mlp.0", 0): 2,
    ("double_stream_modulation_img.lin", 0): 6,
    ("single_stream_modulation.lin", 0): 3,
}
"""(module, axis) -> number of fused parts of equal length, in addition to the attention's."""


def initialize(expert: ActionExpert, editor: Mapping[str, Tensor], how: Initialization) -> None:
    """Set the expert's weights in place.

    editor: the denoiser's weights under their released names (`Editor.released_weights`).

    Raises:
        EditorError: the editor lacks a tensor that the expert needs.
    """
    if how == "none":
        return
    blocks = _editor_blocks(expert.config.blocks)
    with torch.no_grad():
        for name, weight in expert.state_dict().items():
            if not name.startswith(_FROM_EDITOR):
                continue
            source = _source(name, blocks, editor)
            if how == "published":
                weight.copy_(resized(source, weight.shape))
            else:
                weight.copy_(_resized_by_part(name, source, weight, expert.config.layers))
        if how == "published":
            for module in expert.head.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()


def resized(source: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize `source` to `shape` by linear interpolation, axis by axis, keeping both ends of each axis.

    Interpolates in float32 and casts back to the source's dtype. If the last axis (the inputs) changed, scales by
    sqrt(old / new), so that sums over the inputs keep their magnitude.
    """
    out = source.float()
    for axis, size in enumerate(shape):
        if out.shape[axis] != size:
            lines = out.movedim(axis, -1)
            flat = F.interpolate(lines.reshape(1, -1, lines.shape[-1]), size=size, mode="linear", align_corners=True)
            out = flat.reshape(*lines.shape[:-1], size).movedim(-1, axis)
    out = out.to(source.dtype)
    if source.shape[-1] != shape[-1]:
        out = out * math.sqrt(source.shape[-1] / shape[-1])
    return out


def _resized_by_part(name: str, source: Tensor, target: Tensor, layers: Sequence[LayerSpec]) -> Tensor:
    """Resize `source` to the shape of `target`, each part of a fused axis separately."""
    rows = _parts(name, 0, (source.shape[0], target.shape[0]), layers)
    if target.ndim == 1:
        return torch.cat([resized(s, (n,)) for s, n in zip(torch.split(source, rows[0]), rows[1], strict=True)])
    columns = _parts(name, 1, (source.shape[1], target.shape[1]), layers)
    bands = []
    for band, height in zip(torch.split(source, rows[0]), rows[1], strict=True):
        parts = zip(torch.split(band, columns[0], dim=1), columns[1], strict=True)
        bands.append(torch.cat([resized(part, (height, width)) for part, width in parts], dim=1))
    return torch.cat(bands)


def _parts(name: str, axis: int, lengths: tuple[int, int], layers: Sequence[LayerSpec]) -> tuple[list[int], list[int]]:
    """Return the lengths of an axis's parts, in the editor and in the expert.

    The attention's parts have the same length in both. The rest is divided into equal parts.
    """
    module = re.sub(r"^(double|single)_blocks\.\d+\.|\.(weight|scale)$", "", name)
    equal = _EQUAL_PARTS.get((module, axis), 1)
    attention = _attention_parts(layers).get((module, axis), [])

    def parts(length: int) -> list[int]:
        rest = length - sum(attention)
        return [*attention, *([rest // equal] * equal if rest else [])]

    return parts(lengths[0]), parts(lengths[1])


def _attention_parts(layers: Sequence[LayerSpec]) -> dict[tuple[str, int], list[int]]:
    """Return (module, axis) -> lengths of the q, k and v rows, or of the attention's output columns."""
    found: dict[tuple[str, int], list[int]] = {}
    for layer in layers:
        qkv = [n * layer.head_dim for n in (layer.heads, layer.kv_heads, layer.kv_heads)]
        if layer.block == "sequential":
            found["img_attn.qkv", 0] = qkv
        else:
            found["linear1", 0], found["linear2", 1] = qkv, qkv[:1]
    return found


def _source(name: str, blocks: Mapping[str, str], editor: Mapping[str, Tensor]) -> Tensor:
    """Return the editor's tensor that initializes the expert's tensor `name`."""
    block = re.match(r"(double|single)_blocks\.\d+", name)
    theirs = name if block is None else blocks[block[0]] + name[block.end() :]
    if theirs not in editor:
        raise EditorError(
            f"the expert cannot be initialized from this editor, which has no tensor {theirs}",
            "use --init none: the other initializations need a FLUX.2 editor",
        )
    return editor[theirs]


def _editor_blocks(layers: Sequence[LayerSpec]) -> dict[str, str]:
    """Map the expert's block names to those of the editor: they differ if the prefix keeps only some layers.

    layers: the editor layer of each expert block.
    """
    blocks: dict[str, str] = {}
    for kind, block in (("double_blocks", "sequential"), ("single_blocks", "parallel")):
        for i, layer in enumerate(layer for layer in layers if layer.block == block):
            number = re.search(r"\.(\d+)(\.|$)", layer.name)
            blocks[f"{kind}.{i}"] = f"{kind}.{number[1] if number else i}"
    return blocks

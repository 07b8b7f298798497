"""The expert's first weights from the editor's: tensors of the same name, resized by linear interpolation.

published: as the published code does it (arXiv 2606.19531, `preprocess_action_dit_flux2`). Fused axes count as one, so
that in a parallel block, whose attention rows keep their number while the MLP's shrink, queries come from the editor's
queries and keys, keys from all three, and values from its MLP. repaired: each fused part is resized by itself.

Either way the encoders keep their own first weights. published also draws the head as PyTorch does; repaired leaves it
at zero, so that training starts from velocity zero.
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
"""(module, axis) -> how many parts of equal length are fused, beside the attention's."""


def initialize(expert: ActionExpert, editor: Mapping[str, Tensor], how: Initialization) -> None:
    """Set the expert's weights in place.

    editor: the denoiser's weights by their released names (`Editor.released_weights`).

    Raises:
        EditorError: the editor has no tensor of a name that the expert needs.
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
    """`source` with each axis that differs interpolated in turn, the first first, both ends kept.

    Computed in float32 and cast back to the source's dtype; then scaled by sqrt(old / new) inputs where the last axis
    changed, so that sums over them keep their size.
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
    """As `resized`, but for each part of a fused axis alone."""
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
    """Lengths of the parts of an axis, in the editor and in the expert.

    Attention's parts have the same length in both; the equal parts of what remains shrink alike.
    """
    module = re.sub(r"^(double|single)_blocks\.\d+\.|\.(weight|scale)$", "", name)
    equal = _EQUAL_PARTS.get((module, axis), 1)
    attention = _attention_parts(layers).get((module, axis), [])

    def parts(length: int) -> list[int]:
        rest = length - sum(attention)
        return [*attention, *([rest // equal] * equal if rest else [])]

    return parts(lengths[0]), parts(lengths[1])


def _attention_parts(layers: Sequence[LayerSpec]) -> dict[tuple[str, int], list[int]]:
    """(module, axis) -> rows of q, k and v, or columns of the attention's output."""
    found: dict[tuple[str, int], list[int]] = {}
    for layer in layers:
        qkv = [n * layer.head_dim for n in (layer.heads, layer.kv_heads, layer.kv_heads)]
        if layer.block == "sequential":
            found["img_attn.qkv", 0] = qkv
        else:
            found["linear1", 0], found["linear2", 1] = qkv, qkv[:1]
    return found


def _source(name: str, blocks: Mapping[str, str], editor: Mapping[str, Tensor]) -> Tensor:
    """The editor's tensor for one of the expert's."""
    block = re.match(r"(double|single)_blocks\.\d+", name)
    theirs = name if block is None else blocks[block[0]] + name[block.end() :]
    if theirs not in editor:
        raise EditorError(
            f"the expert cannot begin as the editor: it has no {theirs}",
            "use --init none; the published initialisation is for FLUX.2's stack",
        )
    return editor[theirs]


def _editor_blocks(layers: Sequence[LayerSpec]) -> dict[str, str]:
    """Block of the expert -> block of the editor that it stands beside: they differ where layers were left out. layers:
    of the expert's blocks."""
    blocks: dict[str, str] = {}
    for kind, block in (("double_blocks", "sequential"), ("single_blocks", "parallel")):
        for i, layer in enumerate(layer for layer in layers if layer.block == block):
            number = re.search(r"\.(\d+)(\.|$)", layer.name)
            blocks[f"{kind}.{i}"] = f"{kind}.{number[1] if number else i}"
    return blocks

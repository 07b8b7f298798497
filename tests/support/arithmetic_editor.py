"""A small editor that only does arithmetic, so that its exact output is known without a network."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor, WeightsIdentity
from imagewam_cli.editors.settings import PrefixOptions, resolve
from imagewam_cli.hookspecs import EditorDefaults, EditorEntry, ModeDefaults
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec, SegmentSpec
from imagewam_cli.testing.dataset import INSTRUCTIONS as INSTRUCTIONS
from imagewam_cli.testing.dataset import MemoryDataset as MemoryDataset

TEXT, REFERENCE = 8, 4
"""Number of text tokens (the longest instruction has as many words) and of image tokens."""
HEADS, HEAD_DIM = 2, 4
ENTRY = EditorEntry(
    name="arithmetic",
    summary="",
    load="",
    family="",
    defaults=EditorDefaults(
        modes={
            "prefix": ModeDefaults(timestep=0.0, segments=("text", "reference")),
            "denoise": ModeDefaults(timestep=1.0, segments=("text", "target", "reference")),
        },
        text_paddings=("trim", "keep"),
        compute_dtype="float32",
        camera_size=(4, 4),
        size_multiple=4,
        max_text_tokens=TEXT,
        camera_layouts=("tile", "separate"),
    ),
)


class ArithmeticEditor(Editor):
    """Encode K as sines and V as cosines of a number: image sum plus a checksum of the instruction.

    spoil: a function that changes each prefix before it is returned, to imitate faulty editors.
    """

    entry = ENTRY

    def __init__(
        self,
        *,
        weights: str = "weights",
        timestep: float = 0.0,
        spoil: Callable[[PrefixKV], PrefixKV] = lambda prefix: prefix,
    ) -> None:
        self.settings = resolve(PrefixOptions(timestep=timestep), self.entry)
        self._weights, self._spoil = weights, spoil
        self.encoded = 0
        """Number of rows encoded."""

    @classmethod
    def load(cls, options: PrefixOptions, **_: object) -> Self:
        return cls(timestep=options.timestep or 0.0)

    @property
    def spec(self) -> KVSpec:
        kinds = ("sequential", "parallel")
        return KVSpec(
            mode="prefix",
            timestep=self.settings.timestep,
            layers=tuple(
                LayerSpec(
                    name=f"layer {i}",
                    block=kind,
                    heads=HEADS,
                    kv_heads=HEADS,
                    head_dim=HEAD_DIM,
                    segments=(SegmentSpec(name="text", tokens=TEXT), SegmentSpec(name="reference", tokens=REFERENCE)),
                )
                for i, kind in enumerate(kinds)
            ),
            rope=RopeSpec(axes=(2, 2), theta=100.0, action_axis=1, action_ids=(0, 0)),
            text_padding="trim",
            cameras=("top",),
            image_size=(4, 4),
            prompt_template="{instruction}",
        )

    @property
    def weights(self) -> WeightsIdentity:
        sha256 = hashlib.sha256(self._weights.encode()).hexdigest()
        return WeightsIdentity(revision=None, sha256=sha256)

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        self.encoded += len(images)
        layers = []
        for i in range(len(self.spec.layers)):
            k, v = zip(*(numbers(row["top"], t, i) for row, t in zip(images, instructions, strict=True)), strict=True)
            layers.append(LayerKV(torch.from_numpy(np.stack(k)), torch.from_numpy(np.stack(v))))
        valid = torch.from_numpy(np.stack([seen(t) for t in instructions]))
        return self._spoil(PrefixKV(tuple(layers), valid))


def numbers(
    picture: UInt8Image, instruction: str, layer: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return K and V of one row, float32 (tokens, heads, head size)."""
    shape = (TEXT + REFERENCE, HEADS, HEAD_DIM)
    angle = float(picture.sum()) + zlib.crc32(instruction.encode()) % 1000 + 10.0 * layer
    grid = angle + np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(grid).astype(np.float32), np.cos(grid).astype(np.float32)


def seen(instruction: str) -> npt.NDArray[np.bool_]:
    """Return the mask of valid tokens, bool (tokens,): one text token per word, and every reference token."""
    words = len(instruction.split())
    return np.array([True] * words + [False] * (TEXT - words) + [True] * REFERENCE)

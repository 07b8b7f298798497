"""How keys and values are stored: the contract of a codec, and the codecs that cast.

A codec turns K and V of one layer into a few tensors and back. It knows nothing of files, and each row is encoded by
itself, so that a row has the same bytes in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec


class Codec(Protocol):
    """encode and decode work on K and V of one layer, (N, P, H_kv, D). Both run wherever their tensors are."""

    @property
    def name(self) -> str:
        """As the manifest and --codec have it."""
        ...

    def parts(self, layer: LayerSpec) -> Mapping[str, Part]:
        """What is stored of a layer, by names of the codec's own."""
        ...

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors that `parts` names, with the rows in front.

        rope: how the editor rotated the keys; valid: bool (N, P), False where a token is padding and holds zeros,
        which is not to be looked at. Numbers that cannot be held become infinite or NaN in a floating tensor.
        """
        ...

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        """float32 keys and values. stored: each row's numbers are in one piece, the rows may stand apart."""
        ...


@runtime_checkable
class FittedCodec(Codec, Protocol):
    """A codec that is fitted to rows of the cache's own before the first is stored. Its `parts` are known before."""

    def fitted(self, spec: KVSpec, samples: Sequence[PrefixKV]) -> FittedCodec:
        """One that can encode. samples: prefixes of rows from all over the dataset, on the CPU, in batches; the same
        samples give the same codec."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it learned, for a file."""
        ...

    def restored(self, spec: KVSpec, state: Mapping[str, Tensor]) -> FittedCodec:
        """The one that had this state."""
        ...


def all_finite(x: Tensor) -> bool:
    """Whether every number is: NaN or an infinity would be the least or the greatest, found in one pass."""
    if x.dtype == torch.float8_e4m3fn:  # its only other numbers are NaN, all ones behind the sign
        return bool((x.view(torch.uint8) & 0x7F).max() < 0x7F)
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))

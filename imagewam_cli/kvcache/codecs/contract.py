"""The contract of a codec, which decides how keys and values are stored.

A codec encodes K and V of one layer into a few tensors and decodes them. It does not access files. It encodes each row
independently, so a row has the same bytes in every batch.
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
    """Encodes and decodes K and V of one layer, (N, P, H_kv, D), on the device of the tensors it is given."""

    @property
    def name(self) -> str:
        """Name in manifests and for --codec."""
        ...

    def parts(self, layer: LayerSpec) -> Mapping[str, Part]:
        """Return shape and dtype of each tensor stored for a layer, by name."""
        ...

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that `parts` names, with rows as the first dimension.

        rope: the rotation that the editor applied to the keys, or None. valid: bool (N, P), False for padding tokens,
        whose zeros must not influence the encoding. Numbers out of range become infinite or NaN in a float tensor.
        """
        ...

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        """Return float32 keys and values. stored: contiguous within a row, but not necessarily across rows."""
        ...


@runtime_checkable
class FittedCodec(Codec, Protocol):
    """A codec that is fitted to a sample of the cache's rows before any is stored. `parts` works without a fit."""

    def fitted(self, spec: KVSpec, samples: Sequence[PrefixKV]) -> FittedCodec:
        """Return a codec fitted to samples; the same samples give the same codec.

        samples: batches of prefixes from all over the dataset, on the CPU.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the fitted parameters, to be stored in a file."""
        ...

    def restored(self, spec: KVSpec, state: Mapping[str, Tensor]) -> FittedCodec:
        """Return the codec with these fitted parameters."""
        ...


def all_finite(x: Tensor) -> bool:
    """Return True if every number is finite. One pass suffices: NaN and infinity show in the minimum or maximum."""
    if x.dtype == torch.float8_e4m3fn:  # its only non-finite value is NaN: all bits after the sign are 1
        return bool((x.view(torch.uint8) & 0x7F).max() < 0x7F)
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))

"""How positions, times and weights are rounded. Add a convention of a published checkpoint here.

A rounding is recorded by its name, in the settings of a cache and in the config of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagewam_cli.prefix.spec import ComputeDtype, RoundingName


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """One convention. Dtypes are names, so that this module needs no torch."""

    name: RoundingName
    angles: str
    """Dtype of position ids, rotary frequencies and angles."""
    everything_in: ComputeDtype | None = None
    """Dtype of all weights and products, in the editor and in the expert; None: either may use any."""

    @property
    def exact(self) -> bool:
        """Whether angles are those of diffusers' own models."""
        return self.angles == "float64"


EXACT = Rounding(name="exact", angles="float64")
PUBLISHED_BF16 = Rounding(name="published-bf16", angles="bfloat16", everything_in="bfloat16")
"""Convention of the published ImageWAM checkpoints: integers above 256 and angles above 2 pi become coarse in bfloat16,
and the checkpoints were trained on those values (arXiv 2606.19531 and its code)."""
ROUNDINGS = {rounding.name: rounding for rounding in (EXACT, PUBLISHED_BF16)}

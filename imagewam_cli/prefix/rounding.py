"""Rounding conventions for positions, times and weights. Add the convention of a published checkpoint here.

The settings of a cache and the config of an expert record a rounding by its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagewam_cli.prefix.spec import ComputeDtype, RoundingName


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """One convention. Dtypes are names, so that this module needs no torch."""

    name: RoundingName
    angle_dtype: str
    """Dtype of position ids, rotary frequencies and angles."""
    compute_dtype: ComputeDtype | None = None
    """Dtype of all weights and products, in the editor and in the expert; None: either may use any."""

    @property
    def exact(self) -> bool:
        """Whether angles are computed exactly, as in diffusers' own models."""
        return self.angle_dtype == "float64"


EXACT = Rounding(name="exact", angle_dtype="float64")
PUBLISHED_BF16 = Rounding(name="published-bf16", angle_dtype="bfloat16", compute_dtype="bfloat16")
"""Convention of the published ImageWAM checkpoints: integers above 256 and angles above 2 pi become coarse in bfloat16,
and the checkpoints were trained on those values (arXiv 2606.19531 and its code)."""
ROUNDINGS = {rounding.name: rounding for rounding in (EXACT, PUBLISHED_BF16)}

"""Export a policy: the exporter contract, and one module per format.

An exporter reads a policy folder (`policy.bundle`) and writes a new folder. Before it finishes, it compares the result
with torch on the policy's sample rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

TOLERANCE = 1e-4
"""Maximum absolute difference allowed between an export and torch, in float32."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export. errors: check -> maximum absolute difference from torch on the sample rows."""

    folder: Path
    files: Mapping[str, int]
    """File name -> size in bytes."""
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """The class that `ExporterEntry.load` names. Its constructor takes no arguments."""

    def export(self, policy: Path, out: Path, *, weights: Path | None = None) -> ExportReport:
        """Export the policy folder `policy` into `out`, an empty or new folder.

        weights: a diffusers folder of the policy's editor; None: the embedded weights or those in the Hub's cache.

        Raises:
            ExportError: the format cannot express the policy, or the result differs from torch by more than
                `TOLERANCE`. Nothing is written then.
            UsageError: `out` is not empty.
        """
        ...

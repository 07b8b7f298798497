"""Exporting a policy. The contract of an exporter, and one file per format.

An exporter reads a policy folder (`policy.bundle`), writes a folder of its own, and compares what it wrote with torch
on the policy's sample rows before it says that it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

TOLERANCE = 1e-4
"""Greatest difference from torch, float32, that an export may have."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written. errors: check -> greatest absolute difference from torch on the sample rows."""

    folder: Path
    files: Mapping[str, int]
    """file name -> bytes"""
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """What an `ExporterEntry.load` names: a class without constructor arguments."""

    def export(self, policy: Path, out: Path, *, weights: Path | None = None) -> ExportReport:
        """Export the policy folder `policy` into the empty or absent folder `out`.

        weights: a diffusers folder of the policy's editor, where it is not found by itself.

        Raises:
            ExportError: the result differs from torch by more than `TOLERANCE`, or cannot be expressed; nothing is
            left. UsageError: `out` holds something else.
        """
        ...

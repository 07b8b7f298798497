"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class FormatName(StrEnum):
    human = "human"
    json = "json"


FormatOption = Annotated[FormatName, typer.Option("--format", help="How to print the result.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where torch computes: cpu, cuda, cuda:1, mps.")]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="A diffusers folder instead of the editor's own weights.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="First scene or random seed.")]
EnvOption = Annotated[str, typer.Option("--env", help="The simulator; see `imagewam plugins`.")]

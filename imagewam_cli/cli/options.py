"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import COMPUTE, INPUT, OUTPUT
from imagewam_cli.cli.output import output
from imagewam_cli.config import from_dict, option_of
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.files import expanded
from imagewam_cli.kvcache.storage.location import Location, location
from imagewam_cli.workspace import newest


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) of a text like "224x448"; None for no text.

    Raises:
        UsageError: the text does not have this form.
    """
    from imagewam_cli.errors import UsageError

    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UsageError(
            f"--image-size must look like 224x448, got {text!r}", "pass the height, then the width, in pixels"
        )
    return int(height), int(width)


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a text like "text, reference"; None for no text."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def require_at_least_one(**values: int) -> None:
    """Check numbers. values: name of the option, with _ for -, -> number.

    Raises:
        UsageError: a number is below 1.
    """
    from imagewam_cli.errors import UsageError

    for name, value in values.items():
        if value < 1:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be at least 1, got {value}", "omit it for the default")


def require_positive(**values: float) -> None:
    """Check, like `require_at_least_one`, that fractional numbers are above 0 and finite."""
    from imagewam_cli.errors import UsageError

    for name, value in values.items():
        if not 0 < value < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be more than 0, got {value:g}", "omit it for the default")


def require_existing(what: str, path: Path, advice: str) -> Path:
    """Return the path with `~` expanded. what: the option or argument that names it; advice: the hint of the error.

    Raises:
        UsageError: the path does not exist.
    """
    from imagewam_cli.errors import UsageError

    found = expanded(path)
    if not found.exists():
        raise UsageError(f"{what} {path} does not exist", advice)
    return found


def from_home(path: Path | None) -> Path | None:
    """Return the path with `~` expanded; a callback of options."""
    return None if path is None else expanded(path)


def chosen_cache(text: str | None) -> Location:
    """Return the folder or URL of --cache, or the newest cache in caches/. A URL is not checked here.

    Raises:
        UsageError: the folder does not exist.
        CacheError: caches/ holds no cache.
    """
    if text is None:
        return newest_with_notice("--cache", "cache")
    return existing_location("--cache", text, "`imagewam list` shows the caches; `imagewam cache` builds one")


def existing_location(what: str, text: str, advice: str) -> Location:
    """Return a folder that exists, or a URL, which is not checked here.

    Raises:
        UsageError: the folder does not exist.
    """
    address = location(text)
    return address if isinstance(address, str) else require_existing(what, address, advice)


def existing_dataset(path: Path) -> Path:
    """Return the folder of --dataset.

    Raises:
        UsageError: it does not exist.
    """
    return require_existing(
        "--dataset", path, "pass the folder that contains meta/info.json; `imagewam list` shows the datasets"
    )


def existing_policy(option: str, path: Path) -> Path:
    """Return the run or policy that an option names.

    Raises:
        UsageError: it does not exist.
    """
    return require_existing(option, path, "`imagewam list` shows the policies; `imagewam train-expert` trains one")


def _existing_weights(path: Path | None) -> Path | None:
    if path is None:
        return None
    return require_existing("--weights", path, "pass a diffusers folder, or omit it and run `imagewam fetch`")


class FormatName(StrEnum):
    human = "human"
    json = "json"


FormatOption = Annotated[
    FormatName, typer.Option("--format", help="Print the result as text or as JSON.", rich_help_panel=OUTPUT)
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="Torch device: cpu, cuda, cuda:1 or mps.", rich_help_panel=COMPUTE),
]
OffloadOption = Annotated[
    str,
    typer.Option(
        "--offload",
        metavar="WHERE",
        help="Keep idle weights off the device: none, group, sequential or disk.",
        rich_help_panel=COMPUTE,
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the editor's denoiser with torch.compile.", rich_help_panel=COMPUTE)
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="FOLDER|URL",
        help="The cache; by default the newest one in caches/.",
        rich_help_panel=INPUT,
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FOLDER",
        callback=_existing_weights,
        help="Diffusers folder to load instead of the editor's published weights.",
        rich_help_panel=INPUT,
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Seed of the first scene.", rich_help_panel=INPUT)
]
EnvOption = Annotated[
    str,
    typer.Option(
        "--env",
        metavar="NAME",
        help="Simulator; `imagewam plugins --hook environments` lists them.",
        rich_help_panel=INPUT,
    ),
]


def chosen_hardware(device: str, offload: str, compile: bool) -> Hardware:
    """Return the hardware settings.

    Raises:
        UsageError: the options cannot be combined.
    """
    return from_dict(Hardware, {"device": device, "offload": offload, "compile": compile}, source=option_of)


def newest_with_notice(option: str, kind: str) -> Path:
    """Return the newest run or cache in the working folder, to replace a missing option, and print a notice.

    Raises:
        CacheError: there is no cache.
        RunError: there is no run.
    """
    path = newest(kind, option)
    output.say(f"no {option}: using {path}")
    return path

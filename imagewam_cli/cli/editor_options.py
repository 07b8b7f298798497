"""Options of the commands that run an editor: which one, on which pictures, and which K and V to keep."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.auto_layers import auto_count, measured_layers
from imagewam_cli.cli.help import ADVANCED, COMPUTE, CONDITION, INPUT, KEEP
from imagewam_cli.cli.options import (
    CompileOption,
    DeviceOption,
    OffloadOption,
    chosen_hardware,
    existing_dataset,
    from_home,
    listed,
    size_of,
)
from imagewam_cli.cli.output import output
from imagewam_cli.editors.settings import PrefixOptions

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.editors.loading.hardware import Hardware


_PREFIX_FIELDS = {f.name: f for f in dataclasses.fields(PrefixOptions)}


def _prefix_option(name: str, panel: str) -> Any:
    """Return the option for a field of `PrefixOptions`, which holds its help."""
    help = _PREFIX_FIELDS[name].metadata
    flag = "--" + name.replace("_", "-")
    return typer.Option(flag, metavar=help["metavar"], help=help["help"], rich_help_panel=panel)


@dataclass(frozen=True, kw_only=True)
class EditorOptions:
    """What the user asked of the editor; each field is one option of the command line."""

    editor: Annotated[
        str | None,
        typer.Option(
            "--editor",
            metavar="NAME",
            help="Image editor, by default tiny; `imagewam editors` lists them.",
            rich_help_panel=INPUT,
        ),
    ] = None
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            callback=from_home,
            help="LeRobot dataset; by default demonstrations recorded in the tabletop simulator.",
            rich_help_panel=INPUT,
        ),
    ] = None
    mode: Annotated[str | None, _prefix_option("mode", KEEP)] = None
    timestep: Annotated[float | None, _prefix_option("timestep", KEEP)] = None
    layers: Annotated[str, _prefix_option("layers", KEEP)] = "all"
    segments: Annotated[str | None, _prefix_option("segments", KEEP)] = None
    pool: Annotated[int, _prefix_option("pool", KEEP)] = 1
    text_padding: Annotated[str | None, _prefix_option("text_padding", KEEP)] = None
    compute_dtype: Annotated[str | None, _prefix_option("compute_dtype", COMPUTE)] = None
    quantization: Annotated[str, _prefix_option("quantization", COMPUTE)] = "none"
    stride: Annotated[
        int, typer.Option("--stride", metavar="N", help="Use every N-th frame.", rich_help_panel=INPUT)
    ] = 1
    camera: Annotated[
        list[str] | None,
        typer.Option(
            "--camera",
            metavar="NAME",
            help="Camera to use; repeat it for several, in order. By default all cameras.",
            rich_help_panel=INPUT,
        ),
    ] = None
    image_size: Annotated[str | None, _prefix_option("image_size", INPUT)] = None
    camera_layout: Annotated[str | None, _prefix_option("camera_layout", INPUT)] = None
    state_key: Annotated[
        str,
        typer.Option(
            "--state-key", metavar="KEY", help="Column of the robot state in the dataset.", rich_help_panel=ADVANCED
        ),
    ] = "observation.state"
    action_key: Annotated[
        str,
        typer.Option(
            "--action-key", metavar="KEY", help="Column of the action in the dataset.", rich_help_panel=ADVANCED
        ),
    ] = "action"
    blank_images: Annotated[bool, _prefix_option("blank_images", ADVANCED)] = False
    random_weights: Annotated[bool, _prefix_option("random_weights", ADVANCED)] = False
    device: DeviceOption = "cpu"
    offload: OffloadOption = "none"
    compile: CompileOption = False

    def given(self) -> list[str]:
        """Return the options that differ from their defaults, as typed: `--pool`, `--layers`."""
        differing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ["--" + name.replace("_", "-") for name in differing]


def takes_editor_options(*, only_with: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `options` by one option for each field of `EditorOptions`.

    only_with: the option of the command without which these have no effect; the panels of the help name it.
    """
    hints = typing.get_type_hints(EditorOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name] if only_with is None else _in_panel_of(only_with, hints[field.name]),
        )
        for field in dataclasses.fields(EditorOptions)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for o in own for p in (shared if o.name == "options" else [o.replace(kind=o.KEYWORD_ONLY)])]

        def expanded(**values: Any) -> None:
            options = EditorOptions(**{p.name: values.pop(p.name) for p in shared})
            command(options=options, **values)

        expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
        # typer reads the options from the signature
        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {}
        return expanded

    return decorate


def _in_panel_of(option: str, annotation: Any) -> Any:
    """Return the annotation of an option with its panel renamed, such as "Input" to "Input, with --online"."""
    base, info = typing.get_args(annotation)
    moved = copy.copy(info)
    moved.rich_help_panel = f"{info.rich_help_panel}{CONDITION}{option}"
    return Annotated[base, moved]


@dataclass(frozen=True, kw_only=True)
class EditorSetup:
    """The editor, settings and dataset that the options select, before any weights are loaded."""

    kind: type[Editor]
    """The editor's class, bound to its entry."""
    settings: PrefixOptions
    dataset: Dataset
    path: Path
    """Folder of the dataset."""
    weights: Path | None
    hardware: Hardware

    @property
    def name(self) -> str:
        """Default name of a cache or run: EDITOR-DATASET."""
        return f"{self.kind.entry.name}-{self.path.resolve().name}"

    def load(self) -> Editor:
        """Load the editor with every instruction of the dataset, measuring the layers of `auto:K` first."""
        return self.with_measured_layers()._load()

    def with_measured_layers(self) -> EditorSetup:
        """Replace `auto:K` by the layers it selects. Measuring them loads the editor with all layers."""
        count = auto_count(self.settings.layers)
        if count is None:
            return self
        return self.with_layers(measured_layers(self.with_layers("all")._load(), self.dataset, count))

    def with_layers(self, layers: str) -> EditorSetup:
        """Return a copy with other layers."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, layers=layers))

    def _load(self) -> Editor:
        from imagewam_cli.kvcache.building.encoding import instructions_of

        return self.kind.load(
            self.settings,
            instructions=instructions_of(self.dataset),
            weights=self.weights,
            hardware=self.hardware,
        )


def editor_setup(options: EditorOptions, weights: Path | None, *, trial: str | None = None) -> EditorSetup:
    """Find the editor and open the dataset. Without --dataset, record the tabletop demonstrations first.

    trial: the command or option that must not write anything, and so needs --dataset; None: recording is allowed.

    Raises:
        UsageError: an option is wrong, or a trial names no dataset.
        EditorError: the weights are missing, so demonstrations are not recorded either.
        DatasetError: the dataset is damaged or lacks a key or camera.
    """
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.data.types import KeyMap
    from imagewam_cli.editors.installed import installed_editor
    from imagewam_cli.errors import UsageError

    auto_count(options.layers)  # fail before recording demonstrations
    kind = installed_editor(options.editor or "tiny")
    hardware = chosen_hardware(options.device, options.offload, options.compile)
    path = options.dataset
    if path is None:
        if trial is not None:
            raise UsageError(
                f"{trial} needs --dataset", "record demonstrations with `imagewam record`, then pass their folder"
            )
        kind.require_weights(weights)
        path = _demonstrations()
    keys = KeyMap(state=options.state_key, action=options.action_key, cameras=tuple(options.camera or ()))
    dataset = open_dataset(existing_dataset(path), keys)
    return EditorSetup(
        kind=kind,
        settings=_prefix_options(options, tuple(dataset.info.cameras)),
        dataset=dataset,
        path=path,
        weights=weights,
        hardware=hardware,
    )


_PARSERS: dict[str, Callable[[Any], Any]] = {"segments": listed, "image_size": size_of}
"""Parsers of the options that have a text form of their own."""


def _prefix_options(options: EditorOptions, cameras: tuple[str, ...]) -> PrefixOptions:
    """Return the options of the prefix."""
    from imagewam_cli.config import from_dict

    values = {name: getattr(options, name) for name in _PREFIX_FIELDS if hasattr(options, name)}
    for name, parse in _PARSERS.items():
        values[name] = parse(values[name])
    return from_dict(PrefixOptions, values | {"cameras": cameras}, source="command line")


def _demonstrations() -> Path:
    """Return the folder of the tabletop demonstrations, recording them if they do not exist."""
    from imagewam_cli.cli.record import record_demonstrations
    from imagewam_cli.workspace import DEMONSTRATIONS

    if not (DEMONSTRATIONS / "meta" / "info.json").exists():
        output.say(f"no --dataset: recording 200 tabletop demonstrations into {DEMONSTRATIONS}")
        record_demonstrations(DEMONSTRATIONS, "tabletop", 200, 0, "h264")
    else:
        output.say(f"no --dataset: using {DEMONSTRATIONS}")
    return DEMONSTRATIONS

"""Options of the commands that run an editor: which one, on which pictures, and which K and V to keep."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.auto_layers import auto_count, measured_layers
from imagewam_cli.cli.dataset_options import DatasetOptions, option_name, option_parameter, with_options
from imagewam_cli.cli.help import ADVANCED, COMPUTE, INPUT, KEEP
from imagewam_cli.cli.options import (
    CompileOption,
    DeviceOption,
    OffloadOption,
    chosen_hardware,
    existing_dataset,
    from_home,
    parse_size,
    split_names,
)
from imagewam_cli.cli.output import output
from imagewam_cli.editors.settings import PrefixOptions

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.editors.loading.hardware import Hardware


_PREFIX_PANELS = {
    INPUT: ("image_size", "camera_layout"),
    KEEP: ("mode", "timestep", "layers", "segments", "pool", "text_padding"),
    COMPUTE: ("compute_dtype", "quantization"),
    ADVANCED: ("blank_images", "random_weights"),
}
"""Panel -> the fields of `PrefixOptions` that are options of the command line, in the order of `--help`."""
_PARSERS: dict[str, Callable[[Any], object]] = {"segments": split_names, "image_size": parse_size}
"""Parsers for fields that are neither a number, a word nor a flag."""


@dataclass(frozen=True, kw_only=True)
class EditorOptions:
    """Editor options as the user gave them. Each field is one option; `prefix` holds several."""

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
    stride: Annotated[
        int, typer.Option("--stride", metavar="N", help="Use every N-th frame.", rich_help_panel=INPUT)
    ] = 1
    reading: DatasetOptions = field(default_factory=DatasetOptions)
    """One option for each field of `DatasetOptions`."""
    prefix: PrefixOptions = field(default_factory=PrefixOptions)
    """One option for each field of `_PREFIX_PANELS`. Its cameras are set by `editor_setup`, from the dataset."""
    device: DeviceOption = "cpu"
    offload: OffloadOption = "none"
    compile: CompileOption = False

    def given(self) -> list[str]:
        """Return the options that differ from their defaults, as typed: `--pool`, `--layers`."""
        values = vars(self) | vars(self.reading) | {name: getattr(self.prefix, name) for name in _prefix_fields()}
        return [option_name(name) for name, _, default in _flat_fields() if values[name] != default]


def takes_editor_options(*, only_with: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `options` by one option for each field of `EditorOptions`.

    only_with: the option that these options require; the titles of their help panels name it.
    """
    shared = [option_parameter(name, kind, default, only_with) for name, kind, default in _flat_fields()]
    of_dataset = [f.name for f in dataclasses.fields(DatasetOptions)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            given = {p.name: values.pop(p.name) for p in shared}
            prefix = _prefix_options({name: given.pop(name) for name in _prefix_fields()})
            reading = DatasetOptions(**{name: given.pop(name) for name in of_dataset})
            command(options=EditorOptions(**given, reading=reading, prefix=prefix), **values)

        return with_options(command, call, "options", shared)

    return decorate


@functools.cache
def _flat_fields() -> tuple[tuple[str, object, object], ...]:
    """Return name, annotation and default of every option; the fields of `PrefixOptions` replace the field `prefix`,
    and those of `DatasetOptions` the field `reading`."""
    hints = typing.get_type_hints(EditorOptions, include_extras=True)
    prefix_hints = typing.get_type_hints(PrefixOptions)
    panels = {name: panel for panel, names in _PREFIX_PANELS.items() for name in names}
    of_prefix = [
        (
            name,
            Annotated[
                _as_typed(prefix_hints[name]),
                typer.Option(option_name(name), **known.metadata, rich_help_panel=panels[name]),
            ],
            known.default,
        )
        for name, known in _prefix_fields().items()
    ]
    reading_hints = typing.get_type_hints(DatasetOptions, include_extras=True)
    of_dataset = [(f.name, reading_hints[f.name], f.default) for f in dataclasses.fields(DatasetOptions)]
    groups = {"prefix": of_prefix, "reading": of_dataset}
    return tuple(
        option
        for own in dataclasses.fields(EditorOptions)
        for option in groups.get(own.name, [(own.name, hints[own.name], own.default)])
    )


def _as_typed(hint: object) -> object:
    """Return the type that typer parses for a field: numbers and flags as they are, everything else as text.

    `from_dict` then reports a misspelled word and suggests the nearest.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kind = next((k for k in kinds if k in (int, float, bool)), str)
    return kind | None if type(None) in kinds else kind


def _prefix_fields() -> dict[str, dataclasses.Field[object]]:
    """Return the fields of `PrefixOptions` that are options of the command line, in the order of `--help`."""
    known = {f.name: f for f in dataclasses.fields(PrefixOptions)}
    return {name: known[name] for names in _PREFIX_PANELS.values() for name in names}


def _prefix_options(typed: Mapping[str, object]) -> PrefixOptions:
    """Return the options of the prefix. typed: field -> value as parsed by typer."""
    from imagewam_cli.config import from_dict, option_of

    parsed = {name: _PARSERS[name](value) if name in _PARSERS else value for name, value in typed.items()}
    return from_dict(PrefixOptions, parsed, source=option_of)


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
        """Return a copy with the layers that `auto:K` selects; measuring them loads the editor with all layers."""
        count = auto_count(self.settings.layers)
        if count is None:
            return self
        return self.with_layers(measured_layers(self.with_layers("all")._load(), self.dataset, count))

    def with_layers(self, layers: str) -> EditorSetup:
        """Return a copy with these layers."""
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

    trial: name of a command or option that writes nothing and so requires --dataset; None: recording is allowed.

    Raises:
        UsageError: an option is wrong, or a trial lacks --dataset.
        EditorError: the weights are missing (checked before demonstrations are recorded).
        DatasetError: the dataset is damaged or lacks a key or camera.
    """
    from imagewam_cli.data.formats import check_pictures
    from imagewam_cli.editors.installed import installed_editor
    from imagewam_cli.errors import UsageError

    auto_count(options.prefix.layers)  # fail before recording demonstrations
    kind = installed_editor("tiny" if options.editor is None else options.editor)
    hardware = chosen_hardware(options.device, options.offload, options.compile)
    path = options.dataset
    if path is None:
        if trial is not None:
            raise UsageError(
                f"{trial} needs --dataset", "record demonstrations with `imagewam record`, then pass their folder"
            )
        kind.require_weights(weights)
        path = _demonstrations()
    dataset = options.reading.open(existing_dataset(path))
    check_pictures(dataset)  # loading the editor can take minutes
    return EditorSetup(
        kind=kind,
        settings=dataclasses.replace(options.prefix, cameras=tuple(dataset.info.cameras)),
        dataset=dataset,
        path=path,
        weights=weights,
        hardware=hardware,
    )


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

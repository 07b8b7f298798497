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

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor, PrefixSettings
    from imagewam_cli.editors.loading.hardware import Hardware


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
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="How the editor runs: prefix or denoise; by default the editor's own mode.",
            rich_help_panel=KEEP,
        ),
    ] = None
    timestep: Annotated[
        float | None,
        typer.Option(
            "--timestep",
            metavar="T",
            help="Diffusion time in [0, 1] at which K and V are captured; by default the editor's own.",
            rich_help_panel=KEEP,
        ),
    ] = None
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="LAYERS",
            help="all, every:N, a list like 0,4,9, or auto:K (the K layers that best predict actions).",
            rich_help_panel=KEEP,
        ),
    ] = "all"
    segments: Annotated[
        str | None,
        typer.Option(
            "--segments",
            metavar="NAMES",
            help="Kinds of tokens, such as text,reference,target; by default the editor's own choice.",
            rich_help_panel=KEEP,
        ),
    ] = None
    pool: Annotated[
        int,
        typer.Option(
            "--pool",
            metavar="N",
            help="Average each N x N block of picture tokens into one token.",
            rich_help_panel=KEEP,
        ),
    ] = 1
    text_padding: Annotated[
        str | None,
        typer.Option(
            "--text-padding",
            metavar="HOW",
            help="Padding tokens of the text: trim or keep; by default the editor's own choice.",
            rich_help_panel=KEEP,
        ),
    ] = None
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            "--compute-dtype",
            metavar="DTYPE",
            help="Precision of the editor's forward pass: float32, bfloat16 or float16.",
            rich_help_panel=COMPUTE,
        ),
    ] = None
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization",
            metavar="KIND",
            help="Quantize the editor's weights: none, int8 or nf4.",
            rich_help_panel=COMPUTE,
        ),
    ] = "none"
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
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="HxW",
            help="Size of the picture that the editor sees, such as 224x448 (height first).",
            rich_help_panel=INPUT,
        ),
    ] = None
    camera_layout: Annotated[
        str | None,
        typer.Option(
            "--camera-layout",
            metavar="LAYOUT",
            help="tile, separate or head-over-wrists; by default the editor's own layout.",
            rich_help_panel=INPUT,
        ),
    ] = None
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
    blank_images: Annotated[
        bool,
        typer.Option("--blank-images", help="Ablation: replace every picture by a grey one.", rich_help_panel=ADVANCED),
    ] = False
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Ablation: use an editor with untrained weights.", rich_help_panel=ADVANCED
        ),
    ] = False
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
class ChosenEditor:
    """What the options come to, before any weights are loaded."""

    kind: type[Editor]
    """The editor's class, bound to its entry."""
    settings: PrefixSettings
    dataset: Dataset
    path: Path
    """The dataset's folder."""
    weights: Path | None
    hardware: Hardware

    @property
    def name(self) -> str:
        """EDITOR-DATASET, for a folder."""
        return f"{self.kind.entry.name}-{self.path.resolve().name}"

    def load(self) -> Editor:
        """Ready for every instruction of the dataset."""
        return self.settled()._load()

    def settled(self) -> ChosenEditor:
        """With the layers that `auto:K` comes to, which are measured with an editor that is loaded for it."""
        count = auto_count(self.settings.layers)
        if count is None:
            return self
        return self.with_layers(measured_layers(self.with_layers("all")._load(), self.dataset, count))

    def with_layers(self, layers: str) -> ChosenEditor:
        """The same, with other layers."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, layers=layers))

    def _load(self) -> Editor:
        from imagewam_cli.kvcache.building.encoding import instructions_of

        return self.kind.load(
            self.settings,
            instructions=instructions_of(self.dataset),
            weights=self.weights,
            hardware=self.hardware,
        )


def choose_editor(options: EditorOptions, weights: Path | None, *, trial: str | None = None) -> ChosenEditor:
    """Open the dataset, or record the embedded demonstrations where none is named.

    trial: the option, if one is given, with which nothing is to be written.

    Raises:
        UsageError: an option is wrong, or a trial names no dataset.
        EditorError: there are no weights, and demonstrations would be recorded for nothing.
        DatasetError: as `open_dataset`.
    """
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.data.types import KeyMap
    from imagewam_cli.editors.installed import installed_editor
    from imagewam_cli.errors import UsageError

    auto_count(options.layers)  # refused before demonstrations are recorded
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
    return ChosenEditor(
        kind=kind,
        settings=_settings(options, tuple(dataset.info.cameras)),
        dataset=dataset,
        path=path,
        weights=weights,
        hardware=hardware,
    )


def _settings(options: EditorOptions, cameras: tuple[str, ...]) -> PrefixSettings:
    from imagewam_cli.config import from_dict
    from imagewam_cli.editors.contract import PrefixSettings

    size, segments = size_of(options.image_size), listed(options.segments)
    values = {
        "mode": options.mode,
        "timestep": options.timestep,
        "layers": options.layers,
        "segments": list(segments) if segments is not None else None,
        "pool": options.pool,
        "text_padding": options.text_padding,
        "image_size": list(size) if size is not None else None,
        "camera_layout": options.camera_layout,
        "compute_dtype": options.compute_dtype,
        "quantization": options.quantization,
        "cameras": list(cameras),
        "blank_images": options.blank_images,
        "random_weights": options.random_weights,
    }
    return from_dict(PrefixSettings, values, source="command line")


def _demonstrations() -> Path:
    """The embedded demonstrations, recorded when first needed."""
    from imagewam_cli.cli.record import record_demonstrations
    from imagewam_cli.workspace import DEMONSTRATIONS

    if not (DEMONSTRATIONS / "meta" / "info.json").exists():
        output.say(f"no --dataset: recording 200 tabletop demonstrations into {DEMONSTRATIONS}")
        record_demonstrations(DEMONSTRATIONS, "tabletop", 200, 0, "h264")
    else:
        output.say(f"no --dataset: using {DEMONSTRATIONS}")
    return DEMONSTRATIONS

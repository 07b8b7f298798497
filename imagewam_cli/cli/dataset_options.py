"""Options of every command that reads a dataset: which of its features mean what, and which episodes to read."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.help import ADVANCED, CONDITION, INPUT

if TYPE_CHECKING:
    from imagewam_cli.data.episodes import EpisodeSelection
    from imagewam_cli.data.types import Dataset, KeyMap
    from imagewam_cli.policy.loading import ExportedPolicy
    from imagewam_cli.policy.policy import Policy

POLICY_CAMERA = Annotated[
    list[str] | None,
    typer.Option(
        "--camera",
        metavar="THEIRS=OURS",
        help="Camera of the data, and camera of the policy that it stands for, such as front=top; may be repeated. By "
        "default those of the same name.",
        rich_help_panel=INPUT,
    ),
]
"""The option `--camera` of commands in which a policy meets data."""


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """The options as the user gave them. An option that was not given keeps what a policy or a cache knows."""

    camera: Annotated[
        list[str] | None,
        typer.Option(
            "--camera",
            metavar="NAME",
            help="Camera to use; repeat it for several, in order. By default all cameras, or those of the policy.",
            rich_help_panel=INPUT,
        ),
    ] = None
    only_episodes: Annotated[
        str | None,
        typer.Option(
            "--only-episodes",
            metavar="LIST",
            help="Episodes of the dataset to read, such as 0-9,12; by default all.",
            rich_help_panel=INPUT,
        ),
    ] = None
    exclude_episodes: Annotated[
        str | None,
        typer.Option(
            "--exclude-episodes",
            metavar="LIST",
            help="Episodes of the dataset to leave out, such as 3,7-8.",
            rich_help_panel=INPUT,
        ),
    ] = None
    state_key: Annotated[
        str | None,
        typer.Option(
            "--state-key",
            metavar="KEYS",
            help="Feature of the robot state; separate several with commas; none: no state. By default "
            "observation.state, or that of the policy.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    action_key: Annotated[
        str | None,
        typer.Option(
            "--action-key",
            metavar="KEYS",
            help="Feature of the action; separate several with commas. By default action, or that of the policy.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    instruction_key: Annotated[
        str | None,
        typer.Option(
            "--instruction-key",
            metavar="KEY",
            help="Feature of the instruction: texts, or indices into the tasks. By default the task of each frame, or "
            "that of the policy.",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    def keys(self, known: KeyMap | None = None) -> KeyMap:
        """Return the features to read. known: those of the policy or cache, which the options replace."""
        from imagewam_cli.data.types import KeyMap

        given: dict[str, Any] = {
            "state": self.state_key,
            "action": self.action_key,
            "instruction": self.instruction_key,
            "cameras": tuple(self.camera) if self.camera else None,
        }
        return dataclasses.replace(known or KeyMap(), **{k: v for k, v in given.items() if v is not None})

    def episodes(self) -> EpisodeSelection:
        """Return the chosen episodes.

        Raises:
            UsageError: an option is not a list such as 0-9,12, or the two contradict each other.
        """
        from imagewam_cli.data.episodes import EpisodeSelection

        return EpisodeSelection.of(self.only_episodes, self.exclude_episodes)

    def open(self, path: Path, known: KeyMap | None = None) -> Dataset:
        """Open a dataset. known: as in `keys`.

        Raises:
            DatasetError: the dataset is damaged, or lacks a feature or an episode.
            UsageError: an option is wrong.
        """
        from imagewam_cli.data.formats import open_dataset

        return open_dataset(path, self.keys(known), self.episodes())

    def open_for(self, policy: Policy | ExportedPolicy, path: Path) -> tuple[Dataset, Mapping[str, str]]:
        """Open a dataset with the features that a policy was trained on, unless options name others.

        Returns the dataset, and camera of the dataset -> camera of the policy where their names differ.

        Raises:
            DatasetError, UsageError: as `open`.
            RunError: the dataset lacks a camera of the policy.
        """
        from imagewam_cli.data.types import KeyMap
        from imagewam_cli.errors import DatasetError, warn
        from imagewam_cli.policy.matching import Interface, camera_names, match

        cameras = camera_names(self.camera or (), policy.interface)
        theirs = {ours: name for name, ours in cameras.items()}
        reading = dataclasses.replace(self, camera=None)
        known = policy.keys or KeyMap()
        if policy.keys is None and not self.names_features():
            warn(
                f"the policy does not say which features of a dataset it was trained on: reading {known.state} and "
                f"{known.action} of {path}; name others with --state-key, --action-key and --instruction-key"
            )
        known = dataclasses.replace(known, cameras=tuple(theirs.get(name, name) for name in policy.cameras))
        try:
            return reading.open(path, known), cameras
        except DatasetError:
            # say which cameras there are; any other problem is raised below
            every = reading.open(path, dataclasses.replace(known, cameras=()))
            match(policy.interface, Interface.of(every), cameras)
            raise

    def given(self) -> list[str]:
        """Return the options that the user gave, as typed."""
        return [option_name(f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def names_features(self) -> bool:
        """Return whether an option names the state, the action or the instruction."""
        return bool({"--state-key", "--action-key", "--instruction-key"} & set(self.given()))

    def require_unused(self, option: str) -> None:
        """Check that no option was given. option: the one that they require.

        Raises:
            UsageError: an option was given.
        """
        from imagewam_cli.errors import UsageError

        for name in self.given():
            raise UsageError(f"{name} has no effect without {option}", f"omit {name}, or add {option}")


def takes_dataset_options(
    *, only_with: str | None = None, of_policy: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `reading` by one option for each field of `DatasetOptions`.

    only_with: the option that these options require; the titles of their help panels name it.
    of_policy: a policy meets the data, so `--camera` is `POLICY_CAMERA`, which requires no other option.
    """
    hints = typing.get_type_hints(DatasetOptions, include_extras=True)
    fields = dataclasses.fields(DatasetOptions)
    options = [option_parameter(f.name, hints[f.name], f.default, only_with) for f in fields]
    if of_policy:
        options = [option_parameter("camera", POLICY_CAMERA, None, None) if o.name == "camera" else o for o in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            given = {f.name: values.pop(f.name) for f in fields}
            command(reading=DatasetOptions(**given), **values)

        return with_options(command, call, "reading", options)

    return decorate


def with_options(
    command: Callable[..., None], call: Callable[..., None], parameter: str, options: list[inspect.Parameter]
) -> Callable[..., None]:
    """Return `call` with the name, help and parameters of `command`, of which `options` replace one."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p for o in own for p in (options if o.name == parameter else [o.replace(kind=keyword)])]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    # typer reads the options from the signature
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def option_parameter(name: str, kind: object, default: object, only_with: str | None) -> inspect.Parameter:
    """Return the parameter of one option. only_with: see `takes_dataset_options`."""
    annotation = kind if only_with is None else _in_panel_of(only_with, kind)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_name(field: str) -> str:
    """Return the option of a field: `--state-key` for `state_key`."""
    return "--" + field.replace("_", "-")


def _in_panel_of(option: str, annotation: object) -> object:
    """Return the annotation of an option with its panel renamed, such as "Input" to "Input, with --online"."""
    base, info = typing.get_args(annotation)
    moved = copy.copy(info)
    moved.rich_help_panel = f"{info.rich_help_panel}{CONDITION}{option}"
    return Annotated[base, moved]

"""Hooks of a plugin, and the entries that they return.

A plugin is a module (or object) named by an entry point in the group `imagewam`. It implements any of these hooks with
`@hookimpl` and returns entries. An entry is plain data: registering it imports neither torch nor the code that it
names. `load` is an import path "package.module:attribute", imported only when the entry is used. Plugins import these
names from `imagewam_cli.plugin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pluggy

from imagewam_cli.prefix.spec import ComputeDtype, Mode, RoundingName, Segment, TextPadding

GROUP = "imagewam"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that a plugin adds: its name on the command line, a one-line summary, and the path of its code."""

    name: str
    summary: str
    load: str
    requires: str = ""
    """Requirement to `pip install` when a package that the code imports is missing, such as "imagewam[sim]"."""
    members: ClassVar[tuple[str, ...]] = ()
    """Attributes that the loaded object must have. Classes with abstract methods are checked for these too."""
    is_instance: ClassVar[bool] = False
    """Whether `load` names an object that is used directly, not a class."""


@dataclass(frozen=True)
class Component:
    """One sub-folder of a diffusers pipeline: the class that reads it, and how large it is."""

    load: str
    """Import path "package:Class" of a class with `from_pretrained`."""
    parameters: int = 0
    """Number of parameters; 0 for tokenizers, processors and schedulers."""


@dataclass(frozen=True, kw_only=True)
class ModeDefaults:
    """One mode of an editor: its timestep, its tokens, and which of them are kept."""

    timestep: float
    """Diffusion time in [0, 1]: 1 is noise, 0 is clean."""
    segments: tuple[Segment, ...]
    """Kinds of tokens in one forward pass, in token order."""
    kept: tuple[Segment, ...] | None = None
    """Segments that a cache keeps by default; None: all."""


@dataclass(frozen=True, kw_only=True)
class EditorDefaults:
    """Choices that an editor offers, and which of them it uses by default. In each tuple the default comes first."""

    modes: Mapping[Mode, ModeDefaults]
    camera_size: tuple[int, int]
    """(height, width) of each camera's picture."""
    size_multiple: int
    """Sides of a camera's picture are multiples of this number of pixels."""
    max_text_tokens: int | None
    """Longer text is truncated to this length, and padded text is padded to it. None: the editor neither truncates nor
    pads, so `trim` must be its only entry in `text_paddings`."""
    text_paddings: tuple[TextPadding, ...] = ("keep", "trim")
    """Offer `trim` only if the denoiser takes a mask that hides padding."""
    compute_dtype: ComputeDtype = "bfloat16"
    camera_layouts: tuple[str, ...] = ("tile",)
    """Names in `imagewam_cli.data.camera_layout`."""
    roundings: tuple[RoundingName, ...] = ("exact",)
    """Names in `imagewam_cli.prefix.rounding`."""

    @property
    def text_limit(self) -> int:
        """`max_text_tokens`, for an editor that has a limit. Raises ValueError for any other."""
        if self.max_text_tokens is None:
            raise ValueError("this editor does not limit the number of text tokens")
        return self.max_text_tokens


@dataclass(frozen=True, kw_only=True)
class EditorEntry(Entry):
    """An image editor. `load` names a subclass of `imagewam_cli.editors.contract.Editor`."""

    family: str
    """Name of the pipeline class in diffusers."""
    defaults: EditorDefaults
    """Modes, sizes and other choices of the editor."""
    components: Mapping[str, Component] = field(default_factory=dict)
    """Sub-folders of the pipeline that the plugin reads. `imagewam fetch` downloads these and nothing else."""
    denoiser: str = "transformer"
    """Name of the component whose attention is recorded."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Values in the released denoiser's config.json that differ from its class's defaults: they
    determine the layout before anything is downloaded."""
    license: str = "unknown"
    repo: str | None = None
    """Repository on the Hugging Face Hub; None: the weights ship with the plugin."""
    gated: bool | None = None
    """Whether the repository requires consent before downloads; None: unknown."""
    gated_source: str = ""
    """Source of `gated`, such as the model card."""
    prompt_template: str = "{instruction}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Names of the editor's modes, the default first."""
        return tuple(self.defaults.modes)

    @property
    def parameters(self) -> int:
        """Number of parameters of the denoiser; 0 if the entry does not give it."""
        found = self.components.get(self.denoiser)
        return 0 if found is None else found.parameters


@dataclass(frozen=True, kw_only=True)
class ExporterEntry(Entry):
    """An export format. `load` names an `imagewam_cli.export.Exporter`."""

    members: ClassVar[tuple[str, ...]] = ("export",)


@dataclass(frozen=True, kw_only=True)
class EnvironmentEntry(Entry):
    """A simulator. `load` names a factory of `imagewam_cli.sim.environment.Environment`."""


@dataclass(frozen=True, kw_only=True)
class DatasetFormatEntry(Entry):
    """A dataset format. `load` names a class that implements `imagewam_cli.data.formats.DatasetFormat`."""

    members: ClassVar[tuple[str, ...]] = ("detect", "open")


@dataclass(frozen=True, kw_only=True)
class CodecEntry(Entry):
    """An encoding of keys and values. `load` names an instance of `imagewam_cli.kvcache.codecs.contract.Codec`."""

    members: ClassVar[tuple[str, ...]] = ("name", "parts", "encode", "decode")
    is_instance: ClassVar[bool] = True


class Hooks:
    """The hooks. Each may return any number of entries."""

    @hookspec
    def imagewam_editors(self) -> Sequence[EditorEntry]:
        """Image editors for `imagewam cache --editor NAME`."""
        return ()

    @hookspec
    def imagewam_exporters(self) -> Sequence[ExporterEntry]:
        """Formats for `imagewam export --format NAME`."""
        return ()

    @hookspec
    def imagewam_environments(self) -> Sequence[EnvironmentEntry]:
        """Simulators for `imagewam record/eval --env NAME`."""
        return ()

    @hookspec
    def imagewam_dataset_formats(self) -> Sequence[DatasetFormatEntry]:
        """Dataset formats for `--dataset DIR`; the first one whose `detect` returns True opens it."""
        return ()

    @hookspec
    def imagewam_codecs(self) -> Sequence[CodecEntry]:
        """Encodings for `imagewam cache --codec NAME`."""
        return ()

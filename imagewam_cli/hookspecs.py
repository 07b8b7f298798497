"""Everything a plugin can add, on one screen.

A plugin is a module (or object) named by an entry point in group `imagewam`. It implements any of the hooks below with
`@hookimpl` and returns entries. An entry is plain data: registering it imports neither torch nor the code it names;
`load` is an import path "package.module:attribute", followed only when the entry is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

GROUP = "imagewam"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing a plugin adds: its name on the command line, one line about it, and where its code is."""

    name: str
    summary: str
    load: str


@dataclass(frozen=True, kw_only=True)
class EditorEntry(Entry):
    """An image editor. `load` names a class of `imagewam_cli.editors.contract.Editor`."""

    family: str
    """The pipeline class in diffusers."""
    components: Mapping[str, int] = field(default_factory=dict)
    """Sub-folders of the pipeline that the plugin reads -> parameters, 0 where there are none. `imagewam fetch` takes
    these and nothing else."""
    denoiser: str = "transformer"
    """The component whose attention is recorded."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The released denoiser's config.json where it differs from its class's defaults: sizes before anything is
    fetched."""
    modes: tuple[str, ...] = ("prefix",)
    license: str = "unknown"
    repo: str | None = None
    """Repository on the Hugging Face Hub; None: the weights come with the plugin."""
    gated: bool | None = None
    """Whether the repository asks for consent first; None: not known."""
    gated_source: str = ""
    """Who says so."""
    prompt_template: str = "{instruction}"

    @property
    def parameters(self) -> int:
        """Of the denoiser."""
        return self.components.get(self.denoiser, 0)


@dataclass(frozen=True, kw_only=True)
class ExporterEntry(Entry):
    """An export format. `load` names a `imagewam_cli.export.Exporter`."""

    runs_policy: bool = False
    """Whether `imagewam eval --policy FOLDER` can run what it writes."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentEntry(Entry):
    """A simulator. `load` names a factory of `imagewam_cli.sim.environment.Environment`."""


@dataclass(frozen=True, kw_only=True)
class DatasetFormatEntry(Entry):
    """A dataset format. `load` names a `imagewam_cli.data.formats.DatasetFormat`."""


@dataclass(frozen=True, kw_only=True)
class CodecEntry(Entry):
    """A way to store keys and values. `load` names a `imagewam_cli.kvcache.codecs.contract.Codec`."""


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
        """Formats that `--dataset DIR` may have; the first whose `detect` says yes opens it."""
        return ()

    @hookspec
    def imagewam_codecs(self) -> Sequence[CodecEntry]:
        """Encodings for `imagewam cache --codec NAME`."""
        return ()

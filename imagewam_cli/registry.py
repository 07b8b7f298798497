"""Installed plugins, found through entry points and loaded one by one, and the entries that they add.

A plugin that fails to import is recorded with its error and does not affect the others. A name that two plugins claim
is unusable, and the error names both plugins; every other name works.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pluggy

from imagewam_cli.errors import PluginError, UnknownNameError
from imagewam_cli.hookspecs import (
    GROUP,
    CodecEntry,
    DatasetFormatEntry,
    EditorEntry,
    Entry,
    EnvironmentEntry,
    ExporterEntry,
    Hooks,
)

E = TypeVar("E", bound=Entry)

KINDS = {
    "editors": "editor",
    "exporters": "export format",
    "environments": "environment",
    "dataset_formats": "dataset format",
    "codecs": "codec",
}
"""Hook name without `imagewam_` -> what one of its entries is called in messages."""


@dataclass(kw_only=True)
class PluginStatus:
    """State of one plugin: its distribution, the entries that it adds, and the error if it failed to load."""

    name: str
    distribution: str = "unknown"
    version: str = ""
    error: str | None = None
    provides: dict[str, list[str]] = field(default_factory=dict)
    """Kind of entry -> names."""


class Catalog(Generic[E]):
    """The entries of one kind, by name."""

    def __init__(self, kind: str, found: list[tuple[str, E]], failed: Sequence[str] = ()) -> None:
        """failed: names of the plugins that could not be loaded, whose entries are unknown."""
        self.kind, self._failed = kind, tuple(failed)
        self._owners: dict[str, list[tuple[str, E]]] = {}
        for plugin, entry in found:
            self._owners.setdefault(entry.name, []).append((plugin, entry))

    def __iter__(self) -> Iterator[E]:
        return (owners[0][1] for _, owners in sorted(self._owners.items()) if len(owners) == 1)

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def names(self) -> list[str]:
        """Return the names of the usable entries, sorted."""
        return [entry.name for entry in self]

    def claims(self) -> list[tuple[str, E]]:
        """Return every (plugin, entry), duplicates included."""
        return [claim for owners in self._owners.values() for claim in owners]

    def duplicates(self) -> dict[str, list[str]]:
        """Return the names that several plugins claim -> those plugins."""
        return {name: [p for p, _ in owners] for name, owners in self._owners.items() if len(owners) > 1}

    def get(self, name: str) -> E:
        """Return the entry with this name.

        Raises:
            UnknownNameError: no usable entry has the name; the hint suggests the nearest.
            PluginError: two plugins claim the name.
        """
        owners = self._owners.get(name)
        if owners is None:
            error = UnknownNameError(self.kind, name, self.names())
            if self._failed:
                error.hint = f"{error.hint}; {', '.join(self._failed)} could not be loaded, see `imagewam plugins`"
            raise error
        if len(owners) > 1:
            plugins = " and ".join(repr(plugin) for plugin, _ in owners)
            raise PluginError(f"{self.kind} {name!r} is claimed by the plugins {plugins}", "uninstall one of them")
        return owners[0][1]

    def load(self, name: str) -> Any:
        """Import the object that the entry's `load` names.

        Raises:
            PluginError: the import fails, or the object lacks methods or attributes that its kind must have.
        """
        entry = self.get(name)
        found = imported(entry.load, f"{self.kind} {name!r}", entry.requires)
        if entry.is_instance and inspect.isclass(found):
            hint = "let `load` name an instance of it; see docs/reference/plugin-contract.md"
            raise PluginError(f"{self.kind} {name!r} ({entry.load}) is a class", hint)
        lacking = _lacking(found, entry.members)
        if lacking:
            raise PluginError(
                f"{self.kind} {name!r} ({entry.load}) lacks {', '.join(lacking)}", "see docs/guide/plugins.md"
            )
        return found


def imported(path: str, what: str, requires: str = "") -> Any:
    """Import the object at "package.module:attribute". what: its name in an error; requires: as in `Entry`.

    Raises:
        PluginError: the import fails for any reason.
    """
    module, _, attribute = path.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # third-party code may raise anything
        if requires and isinstance(error, ModuleNotFoundError):
            missing = f"{what} needs {error.name}, which is not installed"
            raise PluginError(missing, f"pip install '{requires}'") from None
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{what} cannot be loaded from {path!r}: {reason}") from error


def _lacking(found: object, members: Sequence[str]) -> list[str]:
    """Return the members that an object lacks: required ones, abstract methods, and class variables without a value."""
    missing = {name for name in members if not hasattr(found, name)}
    if not inspect.isclass(found):
        return sorted(missing)
    declared = {
        name
        for base in found.__mro__
        for name, kind in inspect.get_annotations(base).items()
        if "ClassVar" in str(kind) and not hasattr(found, name)
    }
    return sorted(missing | declared | set(getattr(found, "__abstractmethods__", ())))


class Registry:
    """Plugin manager with one catalog for each kind of entry. `Registry.installed()` is shared by the process."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(Hooks)
        self.plugins: list[PluginStatus] = []

    @classmethod
    @functools.cache
    def installed(cls) -> Registry:
        """Return the registry of this process. The first call imports every plugin."""
        registry = cls()
        registry.load_entry_points()
        return registry

    def load_entry_points(self) -> None:
        """Import every plugin of the entry-point group, one by one, and record the errors."""
        for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: p.name):
            status = PluginStatus(name=point.name)
            if point.dist is not None:
                status.distribution, status.version = point.dist.name, point.dist.version
            self.plugins.append(status)
            try:
                self.manager.register(point.load(), name=point.name)
                self.manager.check_pending()
            except Exception as error:  # noqa: BLE001 - third-party code may raise anything; it is reported
                status.error = f"{type(error).__name__}: {error}"
                if self.manager.has_plugin(point.name):
                    self.manager.unregister(name=point.name)

    @property
    def editors(self) -> Catalog[EditorEntry]:
        """Catalog of the editors."""
        return self._catalog("editors")

    @property
    def exporters(self) -> Catalog[ExporterEntry]:
        """Catalog of the export formats."""
        return self._catalog("exporters")

    @property
    def environments(self) -> Catalog[EnvironmentEntry]:
        """Catalog of the simulators."""
        return self._catalog("environments")

    @property
    def dataset_formats(self) -> Catalog[DatasetFormatEntry]:
        """Catalog of the dataset formats."""
        return self._catalog("dataset_formats")

    @property
    def codecs(self) -> Catalog[CodecEntry]:
        """Catalog of the codecs."""
        return self._catalog("codecs")

    def status(self) -> list[PluginStatus]:
        """Return every plugin with the entries that it adds, or the reason why it failed.

        A name claimed twice is an error of both plugins.
        """
        catalogs = [self._catalog(name) for name in KINDS]
        by_name = {status.name: status for status in self.plugins}
        for status in self.plugins:
            status.provides = {}
        for catalog in catalogs:
            for plugin, entry in catalog.claims():
                if plugin in by_name:
                    by_name[plugin].provides.setdefault(catalog.kind, []).append(entry.name)
            for name, plugins in catalog.duplicates().items():
                for plugin in plugins:
                    if plugin in by_name and by_name[plugin].error is None:
                        others = ", ".join(p for p in plugins if p != plugin)
                        by_name[plugin].error = f"{catalog.kind} {name!r} is also claimed by plugin {others!r}"
        return self.plugins

    def _catalog(self, name: str) -> Catalog[Any]:
        # hooks are called one by one, not through pluggy, so that one that fails does not affect the others
        hook = f"imagewam_{name}"
        found: list[tuple[str, Entry]] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            plugin = implementation.plugin_name
            status = next((s for s in self.plugins if s.name == plugin), None)
            try:
                found += [(plugin, entry) for entry in implementation.function()]
            except Exception as error:  # noqa: BLE001 - a failing hook must not hide the entries of others
                if status is not None:
                    status.error = f"{hook}: {type(error).__name__}: {error}"
        return Catalog(KINDS[name], found, [s.name for s in self.plugins if s.error is not None])

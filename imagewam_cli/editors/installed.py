"""Find and load an installed editor by name. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.registry import Registry


def installed_editor(name: str) -> type[Editor]:
    """Return the editor class of that name, bound to its entry.

    Raises:
        UnknownNameError: no installed plugin has an editor of that name.
        PluginError: two plugins claim the name, its code cannot be imported, or its class is incomplete.
    """
    editors = Registry.installed().editors
    kind: type[Editor] = editors.load(name)
    return kind.bound_to(editors.get(name))


def load_editor(
    name: str,
    options: PrefixOptions | None = None,
    *,
    instructions: Sequence[str] = (),
    weights: Path | None = None,
    hardware: Hardware = CPU,
    tuned: Path | None = None,
) -> Editor:
    """Load an installed editor, ready to encode. The arguments are those of `Editor.load`.

    Raises:
        UnknownNameError, PluginError: as `installed_editor`.
        EditorError, UsageError: as `Editor.load`.
    """
    return installed_editor(name).load(
        options or PrefixOptions(), instructions=instructions, weights=weights, hardware=hardware, tuned=tuned
    )

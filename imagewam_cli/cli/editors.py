"""`imagewam editors`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imagewam_cli.cli.options import FormatName, FormatOption
from imagewam_cli.cli.output import bytes_text, output
from imagewam_cli.cli.plan import RECOMMENDED
from imagewam_cli.cli.tables import table

if TYPE_CHECKING:
    from imagewam_cli.hookspecs import EditorEntry
    from imagewam_cli.prefix.spec import KVSpec


_SIZES = {
    "bytes_per_row": "per row",
    "bytes_per_row_recommended": RECOMMENDED,
    "memory_bytes": "caching",
    "memory_bytes_acting": "acting",
}
"""Key in the JSON -> title of the column in the table."""


def editors_command(format: FormatOption = FormatName.human) -> None:
    """List the installed editors with their sizes and licenses.

    The columns "per row" and "pca1" give the bytes per row at the editor's default settings, in 16 bits and with the
    recommended codec. "caching" and "acting" give the memory of the weights while a cache is built and while a policy
    acts; caching takes less if the text encoders can be freed first. "access" is the state of the model's page when
    the editor was added; `imagewam fetch` checks it.

    Examples:
        imagewam editors
        imagewam editors --format json
    """
    from imagewam_cli.registry import Registry

    editors = Registry.installed().editors
    for name, plugins in editors.duplicates().items():
        output.say(f"{name}: not listed, because the plugins {' and '.join(plugins)} both define it")
    with _without_garbage_collection():
        rows = [_row(entry) for entry in editors]
    lines = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:,.0f} M",
            ",".join(row["modes"]),
            _or_unknown(row["layers"]),
            *(_or_unknown(row[key], bytes_text) for key in _SIZES),
            {True: "gated", False: "open", None: "?"}[row["gated"]],
            row["license"],
            row["repo"] or "embedded",
        ]
        for row in rows
    ]
    head = ["editor", "parameters", "modes", "layers", *_SIZES.values(), "access", "license", "weights"]
    output.result(rows, table([head, *lines]), format.value)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Suspend garbage collection.

    Importing the model libraries creates hundreds of thousands of objects that are never freed; scanning them
    repeatedly would take a third of the command's time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _row(entry: EditorEntry) -> dict[str, Any]:
    from imagewam_cli.config import to_dict
    from imagewam_cli.editors.installed import installed_editor
    from imagewam_cli.editors.settings import PrefixOptions
    from imagewam_cli.errors import PluginError
    from imagewam_cli.kvcache.building.shard_plan import bytes_per_row
    from imagewam_cli.registry import Registry

    spec: KVSpec | None = None
    memory: int | None = None
    acting: int | None = None
    try:
        kind = installed_editor(entry.name)
        spec = kind.describe(PrefixOptions())
        memory, acting = kind.memory_bytes(), kind.memory_bytes(acting=True)
    except Exception as error:  # noqa: BLE001 - plugin code: an editor that fails is still listed
        reason = error.message if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        output.say(f"{entry.name} ({entry.load}): {reason}")
    recommended = Registry.installed().codecs.load(RECOMMENDED)
    values = to_dict(entry)
    del values["defaults"]
    return {
        **values,
        "components": {name: component.parameters for name, component in entry.components.items()},
        "modes": list(entry.modes),
        "parameters": entry.parameters,
        "layers": spec and len(spec.layers),
        "bytes_per_row": spec and spec.bytes_per_row(2),
        "bytes_per_row_recommended": spec and bytes_per_row(spec, recommended),
        "memory_bytes": memory,
        "memory_bytes_acting": acting,
    }


def _or_unknown(value: int | None, text: Callable[[int], str] = str) -> str:
    return "?" if value is None else str(text(value))

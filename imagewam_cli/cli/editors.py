"""`imagewam editors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imagewam_cli.cli.options import FormatName, FormatOption
from imagewam_cli.cli.output import bytes_text, output, table

if TYPE_CHECKING:
    from imagewam_cli.hookspecs import EditorEntry
    from imagewam_cli.kvcache.spec import KVSpec
    from imagewam_cli.registry import Catalog


_SIZES = {
    "bytes_per_row": "a row",
    "bytes_per_row_every_4": "every:4",
    "memory_bytes": "caching",
    "memory_bytes_acting": "acting",
}
"""Key of the JSON -> column of the table."""


def editors_command(format: FormatOption = FormatName.human) -> None:
    """List the editors that are installed, and what a row of their prefix would take.

    Bytes are of one row at the editor's own size and settings, in 16 bits: all layers, and every fourth of them.
    Caching and acting are what the weights take in the editor's own dtype. Acting: all parts. Caching: the text
    encoders, or denoiser and VAE, whichever is more, as the former go once all instructions are read; all parts where
    the encoder sees the picture too. Access is what public pages say (in JSON: which); `imagewam fetch` finds out.

    Example: imagewam editors --format json
    """
    from imagewam_cli.registry import Registry

    editors = Registry.installed().editors
    rows = [_row(entry, editors) for entry in editors]
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
    head = ["editor", "parameters", "modes", "layers", *_SIZES.values(), "access", "licence", "weights"]
    output.result(rows, table(head, lines), format.value)


def _row(entry: EditorEntry, editors: Catalog[EditorEntry]) -> dict[str, Any]:
    from imagewam_cli.config import to_dict
    from imagewam_cli.editor import PrefixSettings
    from imagewam_cli.errors import PluginError

    spec: KVSpec | None = None
    thin: KVSpec | None = None
    memory: int | None = None
    acting: int | None = None
    try:
        kind = editors.load(entry.name)
    except PluginError as error:  # one that cannot be loaded is listed all the same
        output.say(f"{entry.name}: {error.message}")
    else:
        spec = kind.describe(entry, PrefixSettings())
        thin = kind.describe(entry, PrefixSettings(layers="every:4"))
        memory = kind.memory_bytes(entry)
        acting = kind.memory_bytes(entry, acting=True)
    return {
        **to_dict(entry),
        "parameters": entry.parameters,
        "layers": spec and len(spec.layers),
        "bytes_per_row": spec and spec.bytes_per_row(2),
        "bytes_per_row_every_4": thin and thin.bytes_per_row(2),
        "memory_bytes": memory,
        "memory_bytes_acting": acting,
    }


def _or_unknown(value: Any, text: Any = str) -> str:
    return "?" if value is None else str(text(value))

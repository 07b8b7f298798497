"""`imagewam editors`."""

from __future__ import annotations

from imagewam_cli.cli.options import FormatName, FormatOption
from imagewam_cli.cli.output import output, table


def editors_command(format: FormatOption = FormatName.human) -> None:
    """List the editors that are installed.

    Example: imagewam editors --format json
    """
    from imagewam_cli.config import to_dict
    from imagewam_cli.registry import Registry

    entries = list(Registry.installed().editors)
    rows = [
        [e.name, f"{e.parameters / 1e6:,.0f} M", ",".join(e.modes), e.license, e.repo or "embedded", e.summary]
        for e in entries
    ]
    text = table(["editor", "parameters", "modes", "licence", "weights", "what"], rows)
    output.result([to_dict(e) for e in entries], text, format.value)

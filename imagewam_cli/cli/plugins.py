"""`imagewam plugins`."""

from __future__ import annotations

from imagewam_cli.cli.options import FormatName, FormatOption
from imagewam_cli.cli.output import output


def plugins_command(format: FormatOption = FormatName.human) -> None:
    """List the plugins, what each adds, and why one could not be loaded.

    Example: imagewam plugins
    """
    from dataclasses import asdict

    from imagewam_cli.registry import Registry

    plugins = Registry.installed().status()
    lines = []
    for plugin in plugins:
        lines.append(f"{plugin.name}  ({plugin.distribution} {plugin.version})".rstrip())
        lines += [f"  {kind}: {', '.join(names)}" for kind, names in plugin.provides.items()]
        if plugin.error is not None:
            lines.append(f"  error: {plugin.error}")
    output.result([asdict(p) for p in plugins], "\n".join(lines), format.value)

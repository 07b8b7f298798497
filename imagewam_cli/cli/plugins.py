"""`imagewam plugins` and `imagewam plugins doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.help import COMPUTE, INPUT, HelpCommand, HelpGroup
from imagewam_cli.cli.options import DeviceOption, FormatName, FormatOption, WeightsOption, parse_size
from imagewam_cli.cli.output import output

if TYPE_CHECKING:
    from imagewam_cli.testing.checks import Finding

plugins_app = typer.Typer(rich_markup_mode=None, cls=HelpGroup, subcommand_metavar="[COMMAND]")


class HookName(StrEnum):
    editors = "editors"
    exporters = "exporters"
    environments = "environments"
    dataset_formats = "dataset_formats"
    codecs = "codecs"


class ComputeDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@plugins_app.callback(invoke_without_command=True)
def plugins_command(
    context: typer.Context,
    hook: Annotated[
        HookName | None,
        typer.Option("--hook", help="List only plugins that add entries of this kind.", rich_help_panel=INPUT),
    ] = None,
    format: FormatOption = FormatName.human,
) -> None:
    """List the installed plugins and their entries.

    Also shows why a plugin could not be loaded.

    Examples:
        imagewam plugins
        imagewam plugins --hook editors
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from imagewam_cli.registry import KINDS, Registry

    kinds = [KINDS[hook.value]] if hook is not None else list(KINDS.values())
    plugins = Registry.installed().status()
    if hook is not None:
        # keep plugins that failed to load: what they would have added is unknown
        plugins = [plugin for plugin in plugins if plugin.error is not None or kinds[0] in plugin.provides]
    values = [asdict(p) | {"provides": {k: v for k, v in p.provides.items() if k in kinds}} for p in plugins]
    lines = []
    for plugin in values:
        lines.append(f"{plugin['name']}  ({plugin['distribution']} {plugin['version']})".rstrip())
        lines += [f"  {kind}: {', '.join(names)}" for kind, names in plugin["provides"].items()]
        if hook is None and not plugin["provides"] and plugin["error"] is None:
            lines.append("  adds nothing; is @hookimpl missing?")
        if plugin["error"] is not None:
            lines.append(f"  error: {plugin['error']}")
    output.result(values, "\n".join(lines), format.value)


@plugins_app.command("doctor", cls=HelpCommand)
def doctor_command(
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="Name of the editor; `imagewam editors` lists them.")],
    weights: WeightsOption = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="HxW",
            help="Size of the picture that the editor sees; a small one is faster.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(
            "--compute-dtype",
            help="Precision of the editor's forward pass; float32 finds the most errors.",
            rich_help_panel=COMPUTE,
        ),
    ] = ComputeDtype.float32,
    device: DeviceOption = "cpu",
    format: FormatOption = FormatName.human,
) -> None:
    """Check an editor against the plugin contract.

    Runs the checks that caches, experts and exports rely on, with real weights or with a small folder of random ones.
    Exits with code 1 if a check fails.

    Examples:
        imagewam plugins doctor tiny --image-size 64x64
    """
    from dataclasses import asdict

    from imagewam_cli.errors import PluginError
    from imagewam_cli.testing.checks import CHECKS, examine
    from imagewam_cli.testing.spec_checks import mode_refusal
    from imagewam_cli.testing.subject import subjects

    modes = subjects(
        editor,
        weights=weights,
        image_size=parse_size(image_size),
        compute_dtype=compute_dtype.value,
        device=device,
        kept=1,
    )
    findings: list[Finding] = []
    for subject in modes:
        mode_refusal(subject)  # report missing weights once, not once for each check
        with output.progress(len(CHECKS), "check") as bar:
            for finding in examine(subject):
                findings.append(finding)
                bar.update()
        subject.clear()
    output.result([asdict(f) for f in findings], "\n".join(_lines(findings)), format.value)
    failed = sum(finding.result == "broken" for finding in findings)
    if failed:
        raise PluginError(f"{editor} fails {failed} of {len(findings)} checks", "see docs/guide/plugins.md")


def _lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line per check, grouped by mode; below a failed check, the observation and how to fix it."""
    marks = {"kept": "ok  ", "broken": "FAIL", "not applicable": "-   "}
    lines: list[str] = []
    mode = None
    for finding in findings:
        if finding.mode != mode:
            mode = finding.mode
            lines.append(f"mode {mode}")
        lines.append(f"  {marks[finding.result]}  {finding.promise}")
        if finding.message is not None:
            lines += [f"        {line}" for line in finding.message.splitlines()]
        if finding.fix is not None:
            lines.append(f"        to fix: {finding.fix}")
    return lines

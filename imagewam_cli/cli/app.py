"""The `imagewam` command: its commands, its global options, and its one error handler."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from imagewam_cli import __version__
from imagewam_cli.cli import (
    attention,
    cache,
    demo,
    editors,
    evaluate,
    export,
    fetch,
    import_,
    info,
    inventory,
    merge,
    plan,
    plugins,
    record,
    report,
    train_expert,
    verify,
)
from imagewam_cli.cli.help import BUILD, GET, JUDGE, LOOK, SHIP, TRAIN, HelpCommand, HelpGroup
from imagewam_cli.cli.hints import fitting, invoked
from imagewam_cli.cli.os_errors import message_and_hint, os_error_of
from imagewam_cli.cli.output import output
from imagewam_cli.cli.stop_signals import exit_code, stopping_on_signals
from imagewam_cli.editors.loading.hardware import is_out_of_memory
from imagewam_cli.errors import ImagewamError

# Newer versions of typer contain their own click, so the base class is reached through an exception that typer exports
_ParserError: type[Exception] = cast(Any, typer.BadParameter).__mro__[2]

_BUG = "this is a bug; `imagewam --debug COMMAND ...` shows the traceback"
_LESS_MEMORY = (
    "an editor needs less with --offload group, --batch 1 or --compute-dtype bfloat16; "
    "train-expert needs less with a smaller --batch, or with --online and a smaller --encode-batch"
)

_NOT_UTF8 = "rename it, or run the command in a UTF-8 locale, such as LC_ALL=C.UTF-8"
_BROKEN_PIPE = 141

_RESUMABLE = ("cache", "demo", "fetch", "train-expert")
"""Commands that continue where they were interrupted."""

app = typer.Typer(
    name="imagewam",
    help="Turn a pretrained image editor into a robot policy.\n\n"
    "The commands are listed in the order in which you use them. "
    "`imagewam demo` runs the whole pipeline on a small built-in task.",
    cls=HelpGroup,
    subcommand_metavar="COMMAND",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"imagewam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback if a command fails.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")] = False,
) -> None:
    output.debug, output.quiet = debug, quiet
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


_cache_app = typer.Typer(rich_markup_mode=None, cls=HelpGroup, subcommand_metavar="[COMMAND]")
_cache_app.callback(invoke_without_command=True)(cache.cache_command)
_cache_app.command("plan", cls=HelpCommand)(plan.plan_command)
_cache_app.command("verify", cls=HelpCommand)(verify.verify_command)
_cache_app.command("report", cls=HelpCommand)(report.report_command)
_cache_app.command("merge", cls=HelpCommand)(merge.merge_command)

_COMMANDS: tuple[tuple[str, str, Callable[..., None] | typer.Typer], ...] = (
    (GET, "fetch", fetch.fetch_command),
    (GET, "import", import_.import_command),
    (GET, "record", record.record_command),
    (BUILD, "cache", _cache_app),
    (TRAIN, "train-expert", train_expert.train_expert_command),
    (JUDGE, "eval", evaluate.eval_command),
    (JUDGE, "attention", attention.attention_command),
    (SHIP, "export", export.export_command),
    (LOOK, "demo", demo.demo_command),
    (LOOK, "info", info.info_command),
    (LOOK, "list", inventory.list_command),
    (LOOK, "editors", editors.editors_command),
    (LOOK, "plugins", plugins.plugins_app),
)
for _panel, _name, _command in _COMMANDS:
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name, rich_help_panel=_panel)
    else:
        app.command(_name, cls=HelpCommand, rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the command line and exit with its code."""
    for name in ("stdout", "stderr"):  # a parent process may have closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
    output.accept_any_text()
    if "_IMAGEWAM_COMPLETE" in os.environ:  # the shell asks for completions
        app(prog_name="imagewam")
    with stopping_on_signals():
        code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or _BROKEN_PIPE
    if code == _BROKEN_PIPE:  # Python flushes once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command.

    Return 0 for success, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, and 141
    if nobody reads stdout any more.
    """
    output.debug = "--debug" in arguments
    try:
        with output.showing_warnings():
            _invoke(_without_help_command(list(arguments)))  # the parser empties the list that it gets
        return 0
    except typer.Exit as done:
        return done.exit_code
    except ImagewamError as error:
        return _report(error, error.message, _fitting(error.hint, arguments), error.exit_code)
    except _ParserError as error:
        parser_error, context = cast(Any, error), getattr(error, "ctx", None)
        message = parser_error.format_message().replace("Value error, ", "")  # pydantic's prefix of any message
        return _report(error, message, context.get_usage() if context is not None else None, 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        resumes = next((word for word in arguments if not word.startswith("-")), None) in _RESUMABLE
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            output.say("stopped; run the same command again to resume" if resumes else "stopped")
        return exit_code(error)
    except Exception as error:  # noqa: BLE001 - top-level boundary: report bugs in one line too
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            return _report(error, f"a file name is not UTF-8: {error.object!a}", _NOT_UTF8, 1)
        if isinstance(error, BrokenPipeError) and _nobody_reads(1):
            return _BROKEN_PIPE
        refused = os_error_of(error)
        if refused is not None:
            message, hint = message_and_hint(refused)
            return _report(error, message, _fitting(hint, arguments), 1)
        if is_out_of_memory(error):
            reason = str(error).partition("\n")[0].partition(". ")[0]
            less = _fitting(_LESS_MEMORY, arguments)
            return _report(error, f"out of memory: {reason}".rstrip(": "), less, 1)
        return _report(error, f"{type(error).__name__}: {error}", _BUG, 1)


def _invoke(arguments: list[str]) -> None:
    """Parse the arguments and run the command. Unlike `app()`, this passes Ctrl-C and a closed pipe on to `run`."""
    command = typer.main.get_command(app)
    with command.make_context("imagewam", arguments) as context:
        command.invoke(context)


def _without_help_command(arguments: list[str]) -> list[str]:
    """Return `cache plan --help` for `help cache plan`, and any other arguments as they are."""
    return [*arguments[1:], "--help"] if arguments[:1] == ["help"] else arguments


def _nobody_reads(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe whose reader has gone, as after `imagewam list | head -1`."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fitting(hint: str | None, arguments: list[str]) -> str | None:
    return None if hint is None else fitting(hint, invoked(typer.main.get_command(app), arguments))


def _report(error: BaseException, message: str, hint: str | None, code: int) -> int:
    if output.debug:
        raise error
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    return code

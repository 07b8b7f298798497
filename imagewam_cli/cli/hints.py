"""Hints that fit the command: they name only options that it has.

Code below the command line names options in its hints, but it serves several commands. An alternative that needs an
option of other commands is left out; if no alternative is left, the hint says which command has the option.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Command

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_QUOTED = re.compile(r"`[^`]*`")
_ALTERNATIVES = re.compile(r"(; |, or )")
_PLACES = {"--out"}
"""Options whose advice makes no sense in a command without them."""


@dataclass(frozen=True, kw_only=True)
class Invoked:
    """A command that was typed.

    name: as in "cache plan". options: all that it takes. others: name -> options, of every command.
    """

    name: str
    options: frozenset[str]
    others: dict[str, frozenset[str]]


def invoked(root: Command, arguments: list[str]) -> Invoked:
    """Return the command that the arguments name."""
    command, words = root, []
    for word in arguments:
        if word.startswith("-"):
            continue
        child = command.commands.get(word) if isinstance(command, TyperGroup) else None
        if child is None:
            break
        command = child
        words.append(word)
    shared = _options(root)
    every = {name: found | shared for name, found in _all(root, "")}
    return Invoked(name=" ".join(words), options=_options(command) | shared, others=every)


def options_in(text: str) -> set[str]:
    """Return the options that a text names, except within a quoted command."""
    return set(_OPTION.findall(_QUOTED.sub("", text)))


def fitting(hint: str, command: Invoked) -> str | None:
    """Return the hint as it applies to the command; None if nothing of it does."""
    if options_in(hint) <= command.options:
        return hint
    parts = _ALTERNATIVES.split(hint)
    kept = [i for i in range(0, len(parts), 2) if options_in(parts[i]) <= command.options]
    if kept:
        text = parts[kept[0]]
        for i in kept[1:]:
            text += parts[i - 1] + parts[i]
        return f"use {text}" if text.startswith("--") else text
    missing = options_in(hint) - command.options
    owner = next((name for name, options in command.others.items() if missing <= options), None)
    if missing <= _PLACES or owner is None:
        return None
    return f"{hint} (of `imagewam {owner}`)"


def _options(command: Command) -> frozenset[str]:
    return frozenset(o for p in command.params for o in (*p.opts, *p.secondary_opts)) | {"--help"}


def _all(command: Command, name: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the names and options of all commands below a group, in the order in which they are used."""
    for word, child in command.commands.items() if isinstance(command, TyperGroup) else ():
        yield f"{name} {word}".strip(), _options(child)
        yield from _all(child, f"{name} {word}")

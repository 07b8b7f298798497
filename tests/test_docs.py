"""Test the documentation: links resolve, imports work, names in code blocks are defined, commands and options exist."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from imagewam_cli.cli import app
from tests.support.paths import DOCS, EXAMPLES, ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md"), *EXAMPLES.rglob("README.md")])
LINK = re.compile(r"(?:\]\(|src=\")([^)\s\"]+)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODULE_NAME = re.compile(r"`(imagewam_[a-z0-9_]+(?:\.\w+)+)[`(]")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_relative_links_resolve(page: Path) -> None:
    broken = [link for link in LINK.findall(without_code(page)) if not resolves(page, link)]
    assert not broken


@each_page
def test_python_blocks_import_and_define_every_name(page: Path) -> None:
    """The blocks of a page share their names, because a reader pastes them one after the other."""
    defined = set(dir(builtins))
    for code in python_blocks(page):
        tree = ast.parse(code)
        for module, name in imports(tree):
            if module.startswith("imagewam_") and not module.startswith("imagewam_mine"):
                import_dotted(f"{module}.{name}" if name else module)
        defined |= bound(tree)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        undefined = used - defined
        assert not undefined


@each_page
def test_module_names_in_the_text_exist(page: Path) -> None:
    for name in MODULE_NAME.findall(page.read_text(encoding="utf-8")):
        import_dotted(name)


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    unknown = [f"{line!r}: {problem}" for line in command_lines(page) for problem in problems(line)]
    assert not unknown


@pytest.mark.parametrize("folder", ["imagewam_cli", "plugins", "examples", "tests"])
def test_pages_named_in_the_code_exist(folder: str) -> None:
    """Find pages written as `docs/...` in error hints, help and docstrings."""
    missing = [
        f"{source.relative_to(ROOT)}: {page}"
        for source in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/[\w/-]+\.md", source.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    ]
    assert not missing


def without_code(page: Path) -> str:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "", text)


def resolves(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in anchors(target)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> Iterator[str]:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            yield code


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def bound(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
    return names


def import_dotted(name: str) -> object:
    """Return the module or attribute with the dotted name, or raise an error."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:i]))
    return found


def command_lines(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks that call `imagewam`, and the commands in inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        shown = re.match(r"(?:    )?(?:\$ )?(imagewam [a-z-].*)", line)
        if shown:
            yield from re.split(r" && | \| ", shown[1])
        yield from re.findall(r"`(imagewam [a-z-][^`]*)`", line)


def problems(line: str) -> Iterator[str]:
    words = [word.strip("[]") for word in shlex.split(line, comments=True)[1:]]
    command: Any = get_command(app.app)
    known = {"-h", "--help"} | options(command)
    path: list[str] = []
    while words and words[0] in getattr(command, "commands", {}):
        path.append(words.pop(0))
        command = command.commands[path[-1]]
        known |= options(command)
    if not path and not words[0].startswith("-"):
        yield f"no command {words[0]}"
    written = (word.partition("=")[0] for word in words)
    yield from (f"no option {option}" for option in written if option.startswith("--") and option not in known)


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}

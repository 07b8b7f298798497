"""docs/reference/cli.md is the help of the commands, word for word."""

from __future__ import annotations

import pytest
import typer

from imagewam_cli.cli.reference import PATH, REFRESH, page
from tests.support.paths import ROOT

WRITTEN_BY = "0.29"
"""typer whose wording the page has; older ones describe some defaults and ranges differently."""


@pytest.mark.skipif(not typer.__version__.startswith(WRITTEN_BY), reason=f"the page was written by typer {WRITTEN_BY}")
def test_the_page_matches_the_help() -> None:
    path = ROOT / PATH
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    assert written == page(), f"{PATH} is stale: run `{REFRESH}` in the root of the repository"


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = page()
    monkeypatch.setenv("COLUMNS", "200")
    assert page() == before
    assert max(len(line) for line in before.splitlines()) <= 80


def test_every_command_is_on_the_page() -> None:
    headings = [line for line in page().splitlines() if line.startswith("## ")]
    assert headings[:5] == ["## imagewam", *(f"## imagewam {name}" for name in ("fetch", "import", "record", "cache"))]
    assert {"## imagewam cache plan", "## imagewam plugins doctor"} <= set(headings)

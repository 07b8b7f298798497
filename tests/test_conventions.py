"""Conventions of the repository that no linter checks."""

from __future__ import annotations

import re

from tests.support.paths import ROOT


def test_tests_share_code_through_support_only() -> None:
    """A test module that others import could not be changed or run on its own."""
    foreign = re.compile(r"^ *(?:from|import) tests\.(?!support\b)", re.MULTILINE)
    files = (ROOT / "tests").rglob("*.py")
    assert [str(path.relative_to(ROOT)) for path in files if foreign.search(path.read_text(encoding="utf-8"))] == []

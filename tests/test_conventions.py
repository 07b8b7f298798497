"""Conventions of the repository that no linter checks."""

from __future__ import annotations

import re

from tests.support.paths import ROOT


def test_tests_share_code_through_support_only() -> None:
    """A test or a conftest that another test imports could not be changed or run alone."""
    foreign = re.compile(r"^ *(?:from|import) tests\.(?!support\b)", re.MULTILINE)
    files = (ROOT / "tests").rglob("*.py")
    assert [str(path.relative_to(ROOT)) for path in files if foreign.search(path.read_text(encoding="utf-8"))] == []

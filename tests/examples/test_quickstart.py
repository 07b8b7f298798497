"""Test that the quickstart script runs from its first cell to its last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES


@pytest.mark.slow
def test_the_quickstart_goes_from_demonstrations_to_a_checked_export(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("6 episodes, ")
    assert "Validation(" in done.stdout
    assert "Rate(" in done.stdout
    assert (tmp_path / "onnx" / "onnx.json").is_file()

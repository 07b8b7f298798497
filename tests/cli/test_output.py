"""Output in any encoding: what an encoding lacks is printed as an escape."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imagewam_cli.cli.output import output
from tests.support.recordings import record, write_v21

SENTENCE = "把红色方块推到左边"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", "é 把 \\udcff".encode()), ("latin-1", b"\xe9 \\u628a \\udcff"), ("ascii", b"\\xe9 \\u628a \\udcff")],
)
def test_results_are_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: bytes) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    output.accept_any_text()
    output.result({}, "é 把 \udcff")
    assert raw.getvalue() == expected + b"\n"


def test_a_command_prints_sentences_of_any_language_to_an_ascii_pipe(tmp_path: Path) -> None:
    recordings = [dataclasses.replace(one, instruction=SENTENCE) for one in record((3,), {"top": (32, 48)})]
    root = write_v21(tmp_path / "名", recordings)
    result = subprocess.run(
        [sys.executable, "-m", "imagewam_cli", "info", str(root)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert SENTENCE.encode("ascii", "backslashreplace") in result.stdout

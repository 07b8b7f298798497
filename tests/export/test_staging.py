"""A folder that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagewam_cli.errors import UsageError
from imagewam_cli.export.staging import sizes, staged


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_the_folder_appears_when_the_block_ends(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "deep" / "export"
    if there:
        out.mkdir(parents=True)
    with staged(out) as folder:
        (folder / "a.txt").write_text("12345")
        assert not (out / "a.txt").exists()
    assert sizes(out) == {"a.txt": 5}
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with staged(tmp_path / "export") as folder:
            (folder / "a.txt").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "export"
    if kind == "folder":
        out.mkdir()
    held = out if kind == "file" else out / "mine.txt"
    held.write_text("mine")
    with pytest.raises(UsageError, match="already holds something"), staged(out):
        pytest.fail("the block must not run")
    assert held.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_the_folder_is_as_open_as_any_other(tmp_path: Path) -> None:
    with staged(tmp_path / "export"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "export").stat().st_mode == (tmp_path / "plain").stat().st_mode

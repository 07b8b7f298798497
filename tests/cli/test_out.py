"""Commands that cannot write their output: one line, exit code 1, and no partial files."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import zeros

from imagewam_cli.cli.app import run
from imagewam_cli.cli.os_errors import message_and_hint, os_error_of, require_writable

SMALL = ["--steps", "2", "--batch", "8", "--set", "expert.hidden=32", "--set", "expert.horizon=4"]
SMALL += ["--set", "policy.execute=2", "--set", "flow.inference_steps=2"]
LIMITS = {
    "record": 3000,
    "cache": 100_000,
    "train-expert": 100_000,
    "eval": 200,
    "open-loop": 200,
    "bundle": 100_000,
    "report": 8000,
    "merge": 100_000,
}
"""Largest file size in bytes to allow: less than the largest file that each command writes."""


@pytest.fixture(scope="module")
def inputs(tabletop: Path, tiny_weights: Path, tiny_cache: Path, policy_folder: Path) -> dict[str, list[str]]:
    """Return each command up to its last option, which takes the output path."""
    weights, policy = ["--weights", str(tiny_weights)], str(policy_folder)
    rows = ["--dataset", str(tabletop), *weights, "--image-size", "64x64", "--stride", "4"]
    return {
        "record": ["record", "--episodes", "1", "--codec", "none", "--out"],
        "cache": ["cache", *rows, "--shard-mb", "0.5", "--out"],
        "train-expert": ["train-expert", "--cache", str(tiny_cache), *SMALL, "--out"],
        "eval": ["eval", "--policy", "random", "--episodes", "1", "--max-steps", "1", "--out"],
        "open-loop": ["eval", "--policy", policy, *weights, "--dataset", str(tabletop), "--episodes", "1", "--out"],
        "bundle": ["export", "--run", policy, *weights, "--format", "bundle", "--out"],
        "report": ["cache", "report", "--cache", str(tiny_cache), *weights, "--rows", "1", "--plot"],
    }


@contextmanager
def no_larger_file_than(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, to imitate a disk that fills up in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def output_of(folder: Path, command: str) -> Path:
    """Return the output path of a command: `folder`, or a plot inside it."""
    return folder / "plot.png" if command == "report" else folder


@pytest.mark.parametrize("command", [name for name in LIMITS if name != "merge"])
def test_a_file_in_the_way_is_reported_and_kept(
    inputs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("precious")
    assert run(["-q", *inputs[command], str(output_of(tmp_path / "file" / "new", command))]) == 1
    problem, advice = capsys.readouterr().err.splitlines()
    assert problem == f"error: a file exists where a folder is needed: {tmp_path / 'file'}"
    assert advice == "hint: write to another path" + ("" if command == "report" else "; --out sets it")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "precious")]


@pytest.mark.parametrize("command", [name for name in LIMITS if name != "merge"])
def test_a_full_disk_leaves_no_partial_file(
    inputs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = ["-q", *inputs[command], str(output_of(tmp_path / "new", command))]
    with no_larger_file_than(LIMITS[command]):
        assert run(arguments) == 1
    assert "error: the file is too large for the disk" in capsys.readouterr().err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if "partial" in path.name or path.name.startswith(".")]
    assert all(path.stat().st_size < LIMITS[command] for path in left), "no file stopped at the limit"
    assert run(arguments) == 0


def test_a_merge_on_a_full_disk_can_be_repeated(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-q", "cache", "merge", str(tmp_path / "new"), str(tiny_cache)]
    with no_larger_file_than(LIMITS["merge"]):
        assert run(arguments) == 1
    assert "too large for the disk" in capsys.readouterr().err
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []
    assert run(arguments) == 0
    for name in ("manifest.json", "table.safetensors", "shards/shard-00001.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tiny_cache / name).read_bytes()


def test_a_full_disk_in_safetensors_is_an_os_error_too(tmp_path: Path) -> None:
    with no_larger_file_than(100), pytest.raises(SafetensorError) as caught:
        save_file({"x": zeros(100)}, tmp_path / "x")
    refused = os_error_of(caught.value)
    assert refused is not None
    assert refused.errno == errno.EFBIG
    assert os_error_of(SafetensorError("No such file or directory (os error 2)")) is None
    assert os_error_of(ValueError("no")) is None


@pytest.mark.parametrize(
    ("number", "line", "advice"),
    [
        (errno.ENOSPC, "the disk is full", "run the same command again"),
        (errno.EACCES, "Permission denied: there", "--out"),
        (errno.EROFS, "the disk is read-only: there", "--out"),
        (errno.EISDIR, "a folder exists where a file is needed: there", "--out"),
    ],
)
def test_each_os_error_has_a_message_and_a_hint(number: int, line: str, advice: str) -> None:
    message, hint = message_and_hint(OSError(number, os.strerror(number), "there"))
    assert message == line
    assert advice in (hint or "")


def test_other_os_errors_keep_the_systems_message() -> None:
    error = OSError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert message_and_hint(error) == ("Broken pipe", None)


def test_require_writable_checks_the_nearest_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError):
        require_writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "statvfs", lambda *_: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(OSError, match="Read-only") as caught:
        require_writable(tmp_path / "a" / "b")
    assert caught.value.filename == str(tmp_path)


def test_every_path_option_expands_a_tilde(
    tabletop: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell does not expand the `~` in `--out=~/here`, so the command must, instead of creating a folder `~`."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "set").symlink_to(tabletop)
    (home / "weights").symlink_to(tiny_weights)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for command in (
        ["record", "--episodes=1", "--codec=none", "--out=~/recorded"],
        ["cache", "--dataset=~/set", "--weights=~/weights", "--image-size=64x64", "--stride=40", "--out=~/cache"],
        ["info", "~/cache"],
        ["cache", "verify", "--cache=~/cache", "--repair", "--dataset=~/set"],
        ["train-expert", "--cache=~/cache", *SMALL, "--out=~/run"],
        ["eval", "--policy=~/run", "--dataset=~/set", "--weights=~/weights", "--episodes=1", "--out=~/eval"],
        ["export", "--run=~/run", "--weights=~/weights", "--format=bundle", "--out=~/bundle"],
        ["cache", "report", "--cache=~/cache", "--weights=~/weights", "--rows=1", "--run=~/run", "--plot=~/r.png"],
    ):
        assert run(["-q", *command]) == 0, command
    made = {"recorded", "cache", "run", "eval", "bundle", "r.png"}
    assert {path.name for path in home.iterdir()} - {"set", "weights", ".cache", ".config"} == made
    assert list(here.iterdir()) == []
    assert run(["-q", "info", "~nobody-of-this-name/cache"]) == 2

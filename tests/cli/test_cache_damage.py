"""Damaged, changed or mixed-up caches on the command line: one line, the next step, and no data lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.kvcache.format.manifest import CHECKSUM, MANIFEST, SHARDS, with_checksum
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.lock import part_lock, write_lock

TRAIN = ["--steps", "1", "--batch", "60", "--set", "expert.hidden=16", "--set", "expert.horizon=4"]
TRAIN += ["--set", "policy.execute=2", "--set", "flow.inference_steps=1"]


@pytest.fixture
def copy(tiny_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


@pytest.fixture
def build(tabletop: Path, tiny_weights: Path) -> list[str]:
    """Return the command that built `tiny_cache`, without --out."""
    rows = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--image-size", "64x64", "--stride", "4"]
    return ["-q", "cache", *rows, "--codec", "fp32", "--batch", "8", "--shard-mb", "0.5"]


def shard(cache: Path, number: int) -> Path:
    return cache / SHARDS / f"shard-{number:05d}.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> tuple[str, str]:
    """Run a command that must fail, and return its error line and its hint line."""
    capsys.readouterr()
    assert run(["-q", *arguments]) == code
    printed = capsys.readouterr()
    problem, hint = (line for line in printed.err.splitlines() if not line.startswith("warning: "))
    assert problem.startswith("error: ")
    assert hint.startswith("hint: ")
    assert "this is a bug" not in hint
    return problem, hint


def missing(cache: Path) -> None:
    shard(cache, 1).unlink()


def truncated(cache: Path) -> None:
    shard(cache, 1).write_bytes(shard(cache, 1).read_bytes()[:-100])


def swapped(cache: Path) -> None:
    shard(cache, 1).rename(cache / "aside")
    shard(cache, 2).rename(shard(cache, 1))
    (cache / "aside").rename(shard(cache, 2))


def renamed(cache: Path) -> None:
    shard(cache, 1).rename(shard(cache, 99999))


def replaced(cache: Path) -> None:
    shutil.copy(shard(cache, 0), shard(cache, 1))


def huge_header(cache: Path) -> None:
    """Make the file claim a header of 8 GB."""
    shard(cache, 1).write_bytes((2**33).to_bytes(8, "little") + shard(cache, 1).read_bytes()[8:])


def flipped_bit(cache: Path) -> None:
    """Flip a bit of one row, which only a check of the row finds."""
    data = bytearray(shard(cache, 1).read_bytes())
    data[-100] ^= 1
    shard(cache, 1).write_bytes(data)


@pytest.mark.parametrize("damage", [missing, truncated, swapped, renamed, replaced, huge_header, flipped_bit])
def test_a_damaged_shard_is_named_and_verify_repairs_it(
    copy: Path,
    tiny_cache: Path,
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    damage(copy)
    for arguments in (
        ["train-expert", "--cache", str(copy), "--out", str(tmp_path / "run"), *TRAIN],
        ["cache", "report", "--cache", str(copy), "--weights", str(tiny_weights), "--rows", "60"],
        *([] if damage is flipped_bit else [["cache", "merge", str(copy)]]),  # merge does not check rows
    ):
        problem, hint = refused(capsys, *arguments)
        assert f"{copy / SHARDS}/shard-0000" in problem
        assert hint == f"hint: run `imagewam cache verify --cache {copy} --repair`"
    assert run(["-q", "cache", "verify", "--cache", str(copy)]) == 1
    assert f"{shard(copy, 1)}: " in capsys.readouterr().out
    assert run(["-q", "cache", "verify", "--cache", str(copy), "--weights", str(tiny_weights), "--repair"]) == 0
    repaired = contents(copy)
    assert {name: repaired[name] for name in contents(tiny_cache)} == contents(tiny_cache)


def change_manifest(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and update its checksum, as if it had been written that way."""
    values = json.loads((cache / MANIFEST).read_text())
    values.pop(CHECKSUM)
    change(values)
    (cache / MANIFEST).write_bytes(with_checksum(values))


@pytest.mark.parametrize(
    ("change", "problem", "hint"),
    [
        (lambda v: v.update(version=3), "has version 3; this imagewam reads version 2", "upgrade imagewam"),
        (lambda v: v["shards"][1].update(file="../../x"), "names the file '../../x'", "into another folder"),
        (lambda v: v.pop("spec"), "is damaged", "into another folder"),
    ],
)
@pytest.mark.parametrize("command", ["info", "verify", "train-expert", "merge", "cache"])
def test_an_invalid_manifest_is_refused_by_every_command(
    copy: Path,
    build: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    problem: str,
    hint: str,
    command: str,
) -> None:
    change_manifest(copy, change)
    before = contents(copy)
    arguments = {
        "info": ["info", str(copy)],
        "verify": ["cache", "verify", "--cache", str(copy), "--repair"],
        "train-expert": ["train-expert", "--cache", str(copy), "--out", str(tmp_path / "run")],
        "merge": ["cache", "merge", str(copy)],
        "cache": [*build[1:], "--out", str(copy)],
    }[command]
    line, advice = refused(capsys, *arguments)
    assert f"{copy / MANIFEST}" in line
    assert problem in line
    assert hint in advice
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("key", "what", "command"),
    [
        ("codec", "uses the codec 'gone'", "train-expert"),
        ("codec", "uses the codec 'gone'", "report"),
        ("editor", "built with the editor 'gone'", "report"),
    ],
)
def test_a_codec_or_editor_that_is_not_installed_is_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, what: str, command: str
) -> None:
    change_manifest(copy, lambda v: (v if key == "codec" else v["fingerprint"]).update({key: "gone"}))
    where = ["cache", "report"] if command == "report" else [command, "--out", str(tmp_path / "run")]
    problem, hint = refused(capsys, *where, "--cache", str(copy))
    assert what in problem
    assert "imagewam plugins --hook" in hint


class TestAnotherDataset:
    """Training needs no dataset. Commands that compute rows again do, and it must be the same one."""

    @pytest.fixture
    def made(self, tabletop: Path, build: list[str], tmp_path: Path) -> tuple[Path, Path, list[str]]:
        """Return a dataset, a cache of it, and the command that built the cache."""
        dataset, cache = Path(shutil.copytree(tabletop, tmp_path / "set")), tmp_path / "cache"
        command = [str(dataset) if text == str(tabletop) else text for text in build] + ["--out", str(cache)]
        assert run(command) == 0
        return dataset, cache, command[1:]

    @pytest.mark.parametrize(
        ("change", "problem", "code"),
        [
            ("changed", "differs in its dataset: ", 1),
            ("gone", "does not exist", 2),
            ("emptied", "not a LeRobot dataset", 1),
        ],
    )
    def test_is_refused_by_commands_that_need_it(
        self,
        made: tuple[Path, Path, list[str]],
        tiny_weights: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        change: str,
        problem: str,
        code: int,
    ) -> None:
        dataset, cache, build = made
        shutil.rmtree(dataset)
        if change == "emptied":
            dataset.mkdir()
        if change == "changed":
            record = ["-q", "record", "--out", str(dataset), "--episodes", "2", "--codec", "none", "--seed", "7"]
            assert run(record) == 0
        truncated(cache)
        before = contents(cache)
        weights = ["--weights", str(tiny_weights)]
        for arguments in (
            ["cache", "report", "--cache", str(cache), *weights],
            ["cache", "verify", "--cache", str(cache), *weights, "--repair"],
            build,
        ):
            line, hint = refused(capsys, *arguments, code=code)
            assert problem in line
            assert "dataset" in line or "dataset" in hint
        assert contents(cache) == before

    def test_is_not_needed_for_training(self, made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
        dataset, cache, _ = made
        shutil.rmtree(dataset)
        assert run(["-q", "train-expert", "--cache", str(cache), "--out", str(tmp_path / "run"), *TRAIN]) == 0


class TestMerging:
    def test_parts_with_different_settings_are_refused(
        self, build: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        parts = [str(tmp_path / name) for name in "ab"]
        for i, more in enumerate(([], ["--layers", "0,1"])):
            assert run([*build, *more, "--out", parts[i], "--part", f"{i}/2"]) == 0
        problem, hint = refused(capsys, "cache", "merge", str(tmp_path / "all"), *parts)
        assert "belong to different caches: setting 'layers' is all in one and 0,1" in problem
        assert "parts that the same command built" in hint
        assert not (tmp_path / "all").exists()

    def test_parts_with_different_shards_are_refused(
        self, build: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        parts = [str(tmp_path / name) for name in "ab"]
        assert run([*build, "--out", parts[0], "--part", "1/2"]) == 0
        assert run([*build, "--shard-mb", "9", "--out", parts[1], "--part", "1/2"]) == 0
        problem, hint = refused(capsys, "cache", "merge", str(tmp_path / "all"), *parts)
        assert (
            "lists episode 2 in shard-00000.safetensors; an earlier part lists it in shard-00002.safetensors" in problem
        )
        assert "the same --shard-mb" in hint
        assert not (tmp_path / "all").exists()

    def test_parts_of_different_numbers_of_workers_are_merged_and_completed(
        self, build: list[str], tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "cache"
        for part in ("0/2", "2/3"):
            assert run([*build, "--out", str(out), "--part", part]) == 0
        capsys.readouterr()
        assert run(["info", str(out), "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["parts"]) == {"0/2", "2/3"}
        complete = found["complete"]
        assert run(["-q", "cache", "merge", str(out)]) == 0
        assert ("rows are missing" in capsys.readouterr().out) != complete
        assert run([*build, "--out", str(out)]) == 0
        assert contents(out) == contents(tiny_cache)

    def test_a_part_that_is_being_built_cannot_be_merged(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        part = "manifest.part-00000-of-00002.json"
        (copy / MANIFEST).rename(copy / part)
        with write_lock(copy, part_lock(part)):
            before = contents(copy)
            problem, hint = refused(capsys, "cache", "merge", str(copy))
            assert contents(copy) == before
        assert f"{copy} is being written by process" in problem
        assert "wait for it to end" in hint
        assert run(["-q", "cache", "merge", str(copy)]) == 0
        assert read_manifest(copy).complete


@pytest.mark.parametrize("what", ["empty", "file", "dataset", "nowhere"])
@pytest.mark.parametrize("command", [["cache", "verify", "--cache"], ["train-expert", "--cache"], ["cache", "merge"]])
def test_a_path_that_is_no_cache_is_refused_and_kept(
    tabletop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], what: str
) -> None:
    folder = tabletop if what == "dataset" else tmp_path / what
    if what == "empty":
        folder.mkdir()
    if what == "file":
        folder.write_text("precious")
    problem, _ = refused(capsys, *command, str(folder), code=2 if what == "nowhere" else 1)
    assert str(folder) in problem
    if what == "file":
        assert folder.read_text() == "precious"
    if what == "empty":
        assert list(folder.iterdir()) == []

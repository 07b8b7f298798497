"""The command line as a user sees it: exit codes, one line and a hint for each error, JSON output."""

from __future__ import annotations

import errno
import gc
import json
from pathlib import Path

import pytest
import torch

from imagewam_cli import __version__
from imagewam_cli.cli import app
from imagewam_cli.cli.output import bytes_text, seconds_text
from imagewam_cli.cli.tables import table
from imagewam_cli.errors import warn

IMPORT = ["import", "--editor", "flux2-klein-base-4b", "--robot", "libero"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = app.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"imagewam {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["cache", "--editor", "tinny"], "unknown editor 'tinny'", "did you mean 'tiny'?"),
        (["record", "--env", "tabeltop", "--out", "x"], "unknown environment 'tabeltop'", "did you mean 'tabletop'?"),
        (["record", "--episodes", "0", "--out", "x"], "--episodes must be at least 1, got 0", "omit it"),
        (["record", "--codec", "vp9", "--out", "x"], "unknown codec 'vp9'", "choose one of"),
        (["cache", "--dtype", "int3"], "unknown codec 'int3'", "choose one of: bf16, fp16, fp32, fp8, int4, int8"),
        (["eval", "--policy", "random", "--video", "avi"], "unknown kind of picture 'avi'", ""),
        (["eval", "--policy", "random", "--split", "tset"], "unknown split 'tset'", "did you mean 'test'?"),
        (["info", "nowhere"], "nowhere does not exist", "imagewam list"),
        (["cache", "--dataset", "nowhere"], "--dataset nowhere does not exist", "meta/info.json"),
        (["cache", "--weights", "nowhere"], "--weights nowhere does not exist", "a diffusers folder"),
        (["train-expert", "--cache", "nowhere"], "--cache nowhere does not exist", "imagewam cache"),
        (
            ["train-expert", "--config", "nowhere.yaml"],
            "--config nowhere.yaml does not exist",
            "docs/guide/training.md",
        ),
        (["train-expert", "--weights", "nowhere"], "--weights nowhere does not exist", "imagewam fetch"),
        (["eval", "--policy", "nowhere"], "--policy nowhere does not exist", "imagewam train-expert"),
        (["eval", "--policy", ".", "--dataset", "nowhere"], "--dataset nowhere does not exist", "imagewam list"),
        (["attention", "--policy", "nowhere", "--dataset", "."], "--policy nowhere does not exist", "imagewam list"),
        (["attention", "--policy", ".", "--dataset", "nowhere"], "--dataset nowhere does not exist", "imagewam list"),
        (["export", "--run", "nowhere"], "--run nowhere does not exist", "imagewam train-expert"),
        (["plugins", "doctor", "tiny", "--weights", "nowhere"], "--weights nowhere does not exist", "omit it"),
        (["cache", "--stride", "0"], "--stride must be at least 1, got 0", "omit it"),
        (["cache", "--batch", "0"], "--batch must be at least 1, got 0", "omit it"),
        (["cache", "--shard-mb", "-1"], "--shard-mb must be more than 0, got -1", "omit it"),
        (["cache", "--shard-mb", "nan"], "--shard-mb must be more than 0, got nan", "omit it"),
        (
            ["plugins", "doctor", "tiny", "--image-size", "12"],
            "--image-size must look like 224x448, got '12'",
            "height",
        ),
        (["eval", "--policy", "random", "--max-steps", "0"], "--max-steps must be at least 1, got 0", "omit it"),
        (["eval", "--policy", "random", "--execute", "0"], "--execute must be at least 1, got 0", "omit it"),
        (["eval", "--policy", "random", "--seed", "-1"], "Invalid value for '--seed'", "Usage"),
        (["eval", "--policy", "random", "--video", "gif, avi"], "unknown kind of picture 'avi'", "mp4"),
        (["fetch", "tiny", "--max-workers", "0"], "Invalid value for '--max-workers'", "Usage"),
        (["demo", "--scenes", "0"], "Invalid value for '--scenes'", "Usage"),
        ([*IMPORT, "nowhere.pt", "--stats", "."], "the checkpoint nowhere.pt does not exist", "model.pt"),
        ([*IMPORT, ".", "--stats", "nowhere"], "--stats nowhere does not exist", "dataset_stats.json"),
        ([*IMPORT, ".", "--stats", ".", "--config", "nowhere"], "--config nowhere does not exist", "omit it"),
        (["cache", "--wrong"], "No such option", "Usage"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["train-expert"], "there is no cache", "imagewam cache"),
        (["eval"], "there is no run", "`imagewam train-expert`, or pass --policy FOLDER"),
        (["export"], "there is no run", "`imagewam train-expert`, or pass --run FOLDER"),
        (["eval", "--policy", "."], ". holds no policy", "imagewam train-expert"),
        (["export", "--run", "."], ". holds no policy", "imagewam train-expert"),
        (["train-expert", "--cache", "."], ". is not a cache", "imagewam cache"),
        (["cache", "--dataset", "."], ". has no meta/info.json", "pass the folder"),
        (["plugins", "doctor", "tiny", "--weights", "."], ". is not a Flux2KleinPipeline folder", "it needs"),
    ],
)
def test_failure_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert message in err
    assert hint in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "somewhere"), 1, "error: Permission denied: somewhere"),
        (KeyboardInterrupt(), 130, "stopped"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            1,
            "error: out of memory: CUDA out of memory\nhint: an editor needs less with --offload group, --batch 1",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), 1, "error: out of memory: MPS backend"),
        (MemoryError(), 1, "error: out of memory\nhint: "),
        (RuntimeError("oops"), 1, "error: RuntimeError: oops\nhint: this is a bug"),
        (ZeroDivisionError("oops"), 1, "error: ZeroDivisionError: oops"),
    ],
)
def test_any_other_exception_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(app, "_invoke", lambda _: fail())
    got, _, err = run(capsys, "editors")
    assert got == code
    assert err.startswith(line)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from imagewam_cli.errors import UnknownNameError

    with pytest.raises(UnknownNameError):
        app.run(["--debug", "cache", "--editor", "tinny"])
    monkeypatch.setattr(app.output, "debug", False)


def test_editors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "editors", "--format", "json")
    assert code == 0
    tiny = next(e for e in json.loads(out) if e["name"] == "tiny")
    assert tiny["family"] == "Flux2KleinPipeline"


@pytest.mark.parametrize("collects", [True, False])
def test_listing_editors_restores_the_state_of_the_garbage_collector(
    capsys: pytest.CaptureFixture[str], collects: bool
) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        assert run(capsys, "editors", "--format", "json")[0] == 0
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_editors_report_memory_for_caching_and_for_acting(capsys: pytest.CaptureFixture[str]) -> None:
    editors = {e["name"]: e for e in json.loads(run(capsys, "editors", "--format", "json")[1])}
    for name, encoder_is_freed in (("flux2-klein-9b", True), ("tiny", True), ("qwen-image-edit", False)):
        editor = editors[name]
        whole, encoder = sum(editor["components"].values()), editor["components"]["text_encoder"]
        width = 4 if name == "tiny" else 2  # bytes per parameter: float32 or bfloat16
        assert editor["memory_bytes_acting"] == width * whole
        caching = max(encoder, whole - encoder) if encoder_is_freed else whole
        assert editor["memory_bytes"] == width * caching
    head = run(capsys, "editors")[1].splitlines()[0].split()
    assert head[head.index("caching") + 1] == "acting"


def test_plugins_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plugins", "--format", "json")
    assert code == 0
    assert {p["name"] for p in json.loads(out)} >= {"builtin", "tiny", "flux2"}


def test_list_in_an_empty_folder_suggests_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "imagewam cache --editor tiny" in run(capsys, "list")[1]


def test_delete_asks_first_and_refuses_other_folders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder = tmp_path / "runs" / "one"
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    other = tmp_path / "precious"  # not a result of imagewam
    other.mkdir()
    assert run(capsys, "list", "--delete", "precious")[0] == 2
    assert other.exists()
    monkeypatch.setattr("typer.confirm", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(capsys, "list", "--delete", "runs/one")[0] == 130
    assert run_folder.exists()
    assert run(capsys, "list", "--delete", "runs/one", "--yes")[0] == 0
    assert not run_folder.exists()


def test_sizes_and_times_are_printed_in_readable_units() -> None:
    assert [bytes_text(x) for x in (12, 3400, 5_600_000, 7.8e9, 9.1e12)] == [
        "12 B",
        "3.4 kB",
        "5.6 MB",
        "7.8 GB",
        "9.1 TB",
    ]
    assert [seconds_text(x) for x in (1.23, 45, 200, 7500)] == ["1.2 s", "45 s", "3 min 20 s", "2 h 5 min"]


def test_table_aligns_columns_left_and_right() -> None:
    lines = [["a", "bb", "c"], ["ccc", "d", "ee"]]
    assert table(lines) == "a    bb  c\nccc  d   ee"
    assert table(lines, left=1) == "a    bb   c\nccc   d  ee"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-q", "cache", "--editor", "tiny"], "stopped; run the same command again to resume"),
        (["record", "--out", "cache"], "stopped"),
    ],
)
def test_ctrl_c_promises_a_resume_only_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_invoke", interrupt)
    monkeypatch.setattr(app.output, "quiet", False)
    assert run(capsys, *arguments)[::2] == (130, f"{text}\n")


def test_a_choice_that_does_not_exist_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "editors", "--format", "yaml")
    assert code == 2
    assert err.startswith("error: Invalid value for '--format': 'yaml' is not one of 'human', 'json'.\n")


def test_a_warning_is_printed_once_and_does_not_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        for _ in range(2):
            warn("joint 3 never moves")

    monkeypatch.setattr(app, "_invoke", lambda _: command())
    assert run(capsys, "-q") == (0, "", "warning: joint 3 never moves\n")

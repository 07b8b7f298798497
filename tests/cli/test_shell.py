"""The command as a shell and a batch system use it: pipes, signals, closed streams, bare commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagewam_cli.cli.app import run
from tests.support.folders import files

IMAGEWAM = [sys.executable, "-m", "imagewam_cli"]


def test_bare_commands_print_their_help_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    bare = capsys.readouterr()
    assert bare.err == ""
    assert run(["--help"]) == 0
    assert capsys.readouterr().out == bare.out
    for command in (["fetch"], ["info"], ["cache", "merge"], ["plugins", "doctor"], ["attention"]):
        assert run(command) == 2
        bare = capsys.readouterr()
        assert bare.err.startswith("error: Missing ")
        assert run([*command, "--help"]) == 0
        assert capsys.readouterr().out == bare.out


def test_help_is_also_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["cache"], ["cache", "plan"]):
        assert run(["help", *command]) == 0
        told = capsys.readouterr().out
        assert run([*command, "--help"]) == 0
        assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trian-expert"], "unknown command of `imagewam` 'trian-expert'", "did you mean 'train-expert'?"),
        (["cache", "verfy"], "unknown command of `imagewam cache` 'verfy'", "did you mean 'verify'?"),
        (["plugins", "x"], "unknown command of `imagewam plugins` 'x'", "choose one of: doctor"),
    ],
)
def test_a_mistyped_command_suggests_the_nearest(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    assert run(words) == 2
    assert capsys.readouterr().err == f"error: {message}\nhint: {hint}\n"


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*IMAGEWAM, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(tmp_path: Path, closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m imagewam_cli list {closed}', sys.executable],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_build_resumes(tmp_path: Path, tabletop: Path, tiny_weights: Path, number: signal.Signals) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--image-size", "64x64", "--stride", "2"]
    command = ["cache", *options, "--batch", "4", "--shard-mb", "0.02", "--threads", "1"]
    out = tmp_path / "cache"
    for _ in range(5):  # on a busy machine the build may be done before it is stopped
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(
            [*IMAGEWAM, *command, "--out", str(out)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
        ) as process:
            until = time.monotonic() + 60
            while not (out / "manifest.json").exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 128 + number, err
    assert err.endswith("stopped; run the same command again to resume\n")
    assert "\r" not in err
    assert not [name for name in files(out) if name.endswith(".partial") or ".lock" in name]
    assert run(["-q", *command, "--out", str(out)]) == 0
    assert run(["-q", *command, "--out", str(tmp_path / "single")]) == 0
    assert files(out) == files(tmp_path / "single")


def test_nohup_ignores_the_closed_terminal(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from imagewam_cli.cli.stop_signals import stopping_on_signals\n"
        "with stopping_on_signals():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "still here\n"

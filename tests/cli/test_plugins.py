"""`imagewam plugins` and `imagewam plugins doctor`, as the author of a plugin sees them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import imagewam_tiny
from imagewam_cli.cli import app
from imagewam_cli.hookspecs import EditorEntry, hookimpl
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.registry import Registry
from imagewam_cli.testing import checks, subject
from imagewam_cli.testing.spec_checks import (
    modes_of_the_entry_load,
    prefix_mode_has_no_target,
    shapes_are_those_of_the_spec,
)
from imagewam_tiny.editor import TinyEditor


class ForgetsALayer(TinyEditor):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return PrefixKV(prefix.layers[1:], prefix.valid)

    def encode(self, *inputs: Sequence[object]) -> PrefixKV:  # type: ignore[override]
        return self.spoil(super().encode(*inputs))  # type: ignore[arg-type]


class Plugin:
    @hookimpl
    def imagewam_editors(self) -> Sequence[EditorEntry]:
        return [
            dataclasses.replace(entry, name="forgetful", load=f"{__name__}:ForgetsALayer")
            for entry in imagewam_tiny.imagewam_editors()
        ]


@pytest.fixture
def forgetful() -> Iterator[str]:
    plugin, manager = Plugin(), Registry.installed().manager
    manager.register(plugin, name="forgetful")
    yield "forgetful"
    manager.unregister(plugin)


@pytest.fixture(autouse=True)
def _few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run only two checks; tests/testing tests all of them."""
    monkeypatch.setattr(checks, "CHECKS", (shapes_are_those_of_the_spec, prefix_mode_has_no_target))


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = app.run(["plugins", "doctor", *map(str, arguments), "--image-size", "64x64"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_sound_editor_passes(capsys: pytest.CaptureFixture[str], tiny_weights: Path) -> None:
    code, out, _ = doctor(capsys, "tiny", "--weights", tiny_weights)
    assert code == 0
    assert out.splitlines()[0] == "mode prefix"
    assert [line[:8] for line in out.splitlines()[1:]] == ["  ok    "] * 2


def test_a_broken_editor_is_exit_1_with_what_to_fix(
    capsys: pytest.CaptureFixture[str], tiny_weights: Path, forgetful: str
) -> None:
    code, out, err = doctor(capsys, forgetful, "--weights", tiny_weights)
    assert code == 1
    assert "  FAIL  K, V and `valid` have the shapes" in out
    assert "        2 layers, but the spec has 3\n        to fix: correct `attention_layers`" in out
    assert "error: forgetful fails 2 of 2 checks" in err


def test_a_mode_that_does_not_load_is_a_finding(
    capsys: pytest.CaptureFixture[str], tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = subject.subjects
    monkeypatch.setattr(checks, "CHECKS", (modes_of_the_entry_load, shapes_are_those_of_the_spec))
    monkeypatch.setattr(
        subject,
        "subjects",
        lambda *a, **o: [
            dataclasses.replace(one, mode=mode) for one in original(*a, **o) for mode in ("prefix", "denoise")
        ],
    )
    code, out, err = doctor(capsys, "tiny", "--weights", tiny_weights)
    assert code == 1
    lines = out.splitlines()
    assert [line[:8] for line in lines[:4]] == ["mode pre", "  ok    ", "  ok    ", "mode den"]
    assert lines[4].startswith("  FAIL  every mode that the entry names")
    assert "the entry names mode denoise" in lines[5]
    assert "to fix: omit it from the modes of the entry's `defaults`" in lines[6]
    assert len(lines) == 7
    assert "error: tiny fails 1 of 3 checks" in err


def test_the_doctor_frees_the_editors_of_each_mode(
    capsys: pytest.CaptureFixture[str], tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[subject.Subject] = []
    original = subject.subjects
    monkeypatch.setattr(subject, "subjects", lambda *a, **o: seen.extend(original(*a, **o)) or seen)
    assert doctor(capsys, "tiny", "--weights", tiny_weights)[0] == 0
    assert [(one.mode, one.loaded) for one in seen] == [("prefix", {})]


def test_findings_as_json(capsys: pytest.CaptureFixture[str], tiny_weights: Path, forgetful: str) -> None:
    code, out, _ = doctor(capsys, forgetful, "--weights", tiny_weights, "--format", "json")
    assert code == 1
    first = json.loads(out)[0]
    assert (first["check"], first["result"]) == ("shapes_are_those_of_the_spec", "broken")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tinny"], 2, "did you mean 'tiny'?"),
        (["flux2-klein-9b", "--weights", "nowhere"], 2, "nowhere does not exist"),
        (["flux2-klein-9b", "--weights", "."], 1, ". is not a Flux2KleinPipeline folder"),
    ],
)
def test_a_missing_editor_or_folder_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    given, out, err = doctor(capsys, *arguments)
    assert (given, out) == (code, "")
    assert message in err


def test_the_doctor_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import imagewam_cli.testing.checks"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hook_lists_only_plugins_that_add_that_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plugins", "--hook", "codecs", "--format", "json"]) == 0
    (builtin,) = json.loads(capsys.readouterr().out)
    assert builtin["name"] == "builtin"
    assert list(builtin["provides"]) == ["codec"]


def test_a_failed_plugin_is_listed_for_every_hook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = next(status for status in Registry.installed().plugins if status.name == "builtin")
    monkeypatch.setattr(failed, "error", "ImportError: gone")
    assert app.run(["plugins", "--hook", "editors"]) == 0
    assert "builtin" in capsys.readouterr().out

"""Test that plugins are loaded one by one, that their errors are reported, and that names are unique."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from imagewam_cli.errors import PluginError, UnknownNameError
from imagewam_cli.hookspecs import CodecEntry, EditorDefaults, EditorEntry, ModeDefaults, hookimpl
from imagewam_cli.registry import PluginStatus, Registry
from imagewam_flux_kontext.editor import FluxKontextEditor

DEFAULTS = EditorDefaults(
    modes={"prefix": ModeDefaults(timestep=0.0, segments=("text",))},
    camera_size=(16, 16),
    size_multiple=16,
    max_text_tokens=8,
)


def entry(name: str, load: str = "math:pi") -> EditorEntry:
    return EditorEntry(name=name, summary="", load=load, family="", defaults=DEFAULTS)


class Plugin:
    def __init__(self, *entries: EditorEntry) -> None:
        self.entries = entries

    @hookimpl
    def imagewam_editors(self) -> Sequence[EditorEntry]:
        return self.entries


def registry_with(monkeypatch: pytest.MonkeyPatch, **plugins: object) -> Registry:
    """Return a registry with these objects as entry points. Loading an exception raises it."""

    class Point:
        dist = None

        def __init__(self, name: str, value: object) -> None:
            self.name, self.value = name, value

        def load(self) -> object:
            if isinstance(self.value, Exception):
                raise self.value
            return self.value

    points = [Point(name, value) for name, value in plugins.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    registry = Registry()
    registry.load_entry_points()
    return registry


def test_first_party_plugins_are_found() -> None:
    registry = Registry.installed()
    assert {"tiny", "flux2-klein-4b"} <= set(registry.editors.names())
    assert {"onnx", "bundle"} <= set(registry.exporters.names())
    assert "tabletop" in registry.environments
    assert "lerobot" in registry.dataset_formats
    assert "bf16" in registry.codecs


def test_broken_plugin_is_reported_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, broken=ImportError("no module named torchx"), good=Plugin(entry("one")))
    assert registry.editors.names() == ["one"]
    errors = {status.name: status.error for status in registry.status()}
    assert errors == {"broken": "ImportError: no module named torchx", "good": None}


def test_plugin_whose_hook_fails_is_reported_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @hookimpl
        def imagewam_editors(self) -> Sequence[EditorEntry]:
            raise RuntimeError("boom")

    registry = registry_with(monkeypatch, failing=Failing(), good=Plugin(entry("one")))
    assert registry.editors.names() == ["one"]
    assert "imagewam_editors: RuntimeError: boom" in str(registry.status()[0].error)


def test_plugin_with_an_unknown_argument_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @hookimpl
        def imagewam_editors(self, surprise: int) -> Sequence[EditorEntry]:
            return ()

    registry = registry_with(monkeypatch, wrong=Wrong(), good=Plugin(entry("one")))
    assert registry.editors.names() == ["one"]
    assert "surprise" in str(registry.status()[-1].error or registry.status()[0].error)


def test_duplicate_name_is_an_error_that_names_both_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, first=Plugin(entry("same")), second=Plugin(entry("same"), entry("other")))
    with pytest.raises(PluginError, match="claimed by the plugins 'first' and 'second'"):
        registry.editors.get("same")
    assert registry.editors.names() == ["other"]
    assert all("same" in str(status.error) for status in registry.status())


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        Registry.installed().editors.get("flux2-klien-4b")
    assert caught.value.hint == "did you mean 'flux2-klein-4b'?"
    assert caught.value.exit_code == 2


def test_an_entry_with_a_missing_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, plugin=Plugin(entry("gone", load="math:absent")))
    with pytest.raises(PluginError, match="'gone' cannot be loaded from 'math:absent'"):
        registry.editors.load("gone")


def test_an_error_in_a_plugins_code_is_a_plugin_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imagewam_faulty.py").write_text("raise ValueError('no such table')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = registry_with(monkeypatch, plugin=Plugin(entry("faulty", load="imagewam_faulty:Editor")))
    with pytest.raises(PluginError, match=r"'faulty' cannot be loaded from .* ValueError: no such table"):
        registry.editors.load("faulty")


def test_a_method_missing_from_an_editor_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, plugin=Plugin(entry("half", load="imagewam_cli.editors.contract:Editor")))
    with pytest.raises(
        PluginError, match=r"'half' \(imagewam_cli.editors.contract:Editor\) lacks encode, load, spec, weights"
    ):
        registry.editors.load("half")


def test_a_class_variable_missing_from_an_editor_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Undecided", (FluxKontextEditor,), {})
    monkeypatch.setattr(sys.modules[__name__], "Undecided", kind, raising=False)
    registry = registry_with(monkeypatch, plugin=Plugin(entry("undecided", load=f"{__name__}:Undecided")))
    assert registry.editors.load("undecided").action_id == FluxKontextEditor.action_id
    monkeypatch.delattr(FluxKontextEditor, "action_id")
    with pytest.raises(PluginError, match=r"'undecided' \(.*:Undecided\) lacks action_id") as caught:
        registry.editors.load("undecided")
    assert caught.value.hint == "see docs/guide/plugins.md"


def test_an_unknown_name_hints_at_plugins_that_failed_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, plugin=Plugin(entry("one")))
    registry.plugins.append(PluginStatus(name="acme", error="ImportError: no module"))
    with pytest.raises(UnknownNameError) as caught:
        registry.editors.get("acme-edit")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("acme could not be loaded, see `imagewam plugins`")


def test_a_plugin_can_be_registered_and_removed_at_run_time() -> None:
    registry = Registry.installed()
    plugin = types.SimpleNamespace()
    plugin = Plugin(entry("by-hand"))
    registry.manager.register(plugin, name="by-hand")
    try:
        assert "by-hand" in registry.editors
    finally:
        registry.manager.unregister(plugin)
    assert "by-hand" not in registry.editors


@pytest.mark.parametrize("arguments", [["--help"], ["cache", "--help"], ["plugins"]])
def test_help_and_plugins_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from imagewam_cli.cli.app import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'diffusers', 'transformers', 'pyarrow', 'av'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class _Codecs:
    """A plugin with one codec at an import path."""

    def __init__(self, load: str) -> None:
        self.load = load

    @hookimpl
    def imagewam_codecs(self) -> list[CodecEntry]:
        return [CodecEntry(name="half", summary="a codec of a test", load=self.load)]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("imagewam_cli.kvcache.codecs.cast:CastCodec", r"codec 'half' \(.*CastCodec\) is a class"),
        ("imagewam_cli.kvcache.storage.location:name_of", "codec 'half' .* lacks decode, encode, name, parts"),
    ],
    ids=["a class", "lacks members"],
)
def test_what_cannot_be_a_codec_is_refused_at_load(load: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, plugin=_Codecs(load))
    with pytest.raises(PluginError, match=message):
        registry.codecs.load("half")


def test_every_builtin_entry_loads() -> None:
    registry = Registry.installed()
    for catalog in (registry.codecs, registry.exporters, registry.environments, registry.dataset_formats):
        for entry in catalog:
            assert catalog.load(entry.name) is not None

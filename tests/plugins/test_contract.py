"""Run the contract tests on every first-party editor, with tiny random weights. Add a line below for a new editor."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from imagewam_cli.registry import Registry
from imagewam_cli.testing.contract import EditorContract


def first_party(editor: str, builder: str, size: tuple[int, int], **options: object) -> type[EditorContract]:
    """Return the contract tests of an editor.

    builder: a module of `tests.support.editors` whose `build(path, **options)` writes the weights folder.
    size: (height, width).
    """

    class Contract(EditorContract):
        name = editor
        image_size = size

        @pytest.fixture(scope="class")
        @classmethod
        def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
            path = tmp_path_factory.mktemp("contract") / editor
            importlib.import_module(f"tests.support.editors.{builder}").build(path, **options)
            return path

    return Contract


class TestTiny(EditorContract):
    """Contract tests of `tiny`, on its embedded weights."""

    name = "tiny"
    image_size = (64, 64)


TestFlux2 = first_party("flux2-klein-4b", "flux2", (32, 32))
TestInstructPix2Pix = first_party("instruct-pix2pix", "instruct_pix2pix", (32, 32))
TestSdxl = first_party("sdxl-instruct-pix2pix", "sdxl", (32, 32))
TestKontext = first_party("flux-kontext", "flux_kontext", (32, 32))
TestLongCat = first_party("longcat-image-edit", "longcat", (32, 32))
TestQwen = first_party("qwen-image-edit", "qwen", (32, 32))
TestQwenPlus = first_party("qwen-image-edit-plus", "qwen", (32, 32), plus=True)


def test_every_editor_class_has_contract_tests() -> None:
    classes = {entry.name: entry.load for entry in Registry.installed().editors}
    here = {classes[value.name] for name, value in globals().items() if name.startswith("Test")}
    missing = set(classes.values()) - here
    assert not missing, "add a line above"

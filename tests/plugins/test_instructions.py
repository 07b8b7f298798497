"""What reaches the text encoders of an instruction, for every family with tiny weights: cut text is never silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import EditorError, ImagewamWarning
from tests.support.editors import flux2, flux_kontext, instruct_pix2pix, longcat, qwen, sdxl

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "flux2-klein-4b": flux2.build,
    "flux-kontext": flux_kontext.build,
    "instruct-pix2pix": instruct_pix2pix.build,
    "longcat-image-edit": longcat.build,
    "sdxl-instruct-pix2pix": sdxl.build,
    "qwen-image-edit": qwen.build,
}
LIMITED = [name for name in BUILDERS if name != "qwen-image-edit"]
LONG = "keep clear of the other things. " * 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, built = tmp_path_factory.mktemp("editors"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = BUILDERS[name](root / name)
        return built[name]

    return folder


def load(folder: Path, *instructions: str) -> DiffusersEditor:
    options = PrefixOptions(cameras=("top",), image_size=(64, 96), compute_dtype="float32", text_padding="trim")
    editor = load_editor(folder.name, options, instructions=instructions, weights=folder)
    assert isinstance(editor, DiffusersEditor)
    return editor


@pytest.mark.parametrize("name", BUILDERS)
def test_short_instructions_are_read_whole(folders: Callable[[str], Path], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImagewamWarning)
        editor = load(folders(name), "put it left", "Put it left", "put it right")
    left, right = (editor.prompt_tokens(editor.prompt(f"put it {side}")) for side in ("left", "right"))
    assert all(not found.lost for found in left.values())
    assert all(left[part].ids != right[part].ids for part in left)


@pytest.mark.parametrize("name", LIMITED)
def test_the_lost_end_of_an_instruction_is_named(folders: Callable[[str], Path], name: str) -> None:
    with pytest.warns(ImagewamWarning, match=r"only the first \d+ tokens .*; this end is lost: .*put it on the zone'"):
        editor = load(folders(name), f"{LONG}put it on the zone", "go")
    tokens = editor.prompt_tokens(f"{LONG}put it on the zone")[editor.text_tokenizer]
    assert len(tokens.ids) == editor.entry.defaults.max_text_tokens


@pytest.mark.parametrize("name", LIMITED)
def test_instructions_that_are_equal_after_cutting_are_refused(folders: Callable[[str], Path], name: str) -> None:
    with (
        pytest.warns(ImagewamWarning, match="this end is lost"),
        pytest.raises(EditorError, match=r"because it cuts off their ends: 'keep .*on a zone' and 'keep .*it away'"),
    ):
        load(folders(name), f"{LONG}put it on a zone", f"{LONG}throw it away")


def test_text_without_a_limit_is_not_lost(folders: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImagewamWarning)
        load(folders("qwen-image-edit"), f"{LONG}put it on a zone", f"{LONG}throw it away")


def test_a_live_editor_checks_each_new_instruction(folders: Callable[[str], Path]) -> None:
    texts = load(folders("instruct-pix2pix"))._texts
    with pytest.warns(ImagewamWarning, match="this end is lost"):
        texts.batch([f"{LONG}put it on a zone"])
    with pytest.raises(EditorError, match="cuts off their ends"):
        texts.batch([f"{LONG}throw it away"])


def test_cutting_only_the_template_loses_nothing(folders: Callable[[str], Path]) -> None:
    editor = load(folders("flux2-klein-4b"))
    limit = editor.entry.defaults.max_text_tokens
    assert limit is not None
    prompt = "a" * limit
    while editor.prompt_tokens(prompt)["tokenizer"].lost:
        prompt = prompt[:-1]
    assert len(editor.prompt_tokens(prompt)["tokenizer"].ids) == limit
    assert editor.prompt_tokens(f"{prompt}a")["tokenizer"].lost == "a"

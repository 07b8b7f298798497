"""`cli.editor_options`: commands receive the shared editor options beside their own."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import pytest
import typer

from imagewam_cli.cli.dataset_options import DatasetOptions
from imagewam_cli.cli.editor_options import EditorOptions, editor_setup, takes_editor_options
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import ConfigError, DatasetError


def parsed(*arguments: str) -> tuple[EditorOptions, int]:
    """Run a command that has one option of its own, and return the values it received."""
    app, seen = typer.Typer(), []

    @takes_editor_options()
    def command(*, options: EditorOptions, own: Annotated[int, typer.Option("--own")] = 5) -> None:
        """Command."""
        seen.append((options, own))

    app.command()(command)
    app(args=list(arguments), standalone_mode=False)
    return seen[0]


def test_defaults_without_options() -> None:
    options, own = parsed()
    assert (options, own) == (EditorOptions(), 5)
    assert options.given() == []


def test_options_reach_the_command() -> None:
    arguments = ["--editor", "tiny", "--dataset", "there", "--timestep", "0.5", "--camera", "a", "--camera", "b"]
    options, own = parsed(*arguments, "--own", "7", "--blank-images", "--image-size", "64x32")
    prefix = PrefixOptions(timestep=0.5, blank_images=True, image_size=(64, 32))
    reading = DatasetOptions(camera=["a", "b"])
    expected = EditorOptions(editor="tiny", dataset=Path("there"), reading=reading, prefix=prefix)
    assert (options, own) == (expected, 7)
    named = ["--editor", "--dataset", "--camera", "--image-size", "--timestep", "--blank-images"]
    assert options.given() == named


def test_options_become_settings_and_hardware(tabletop: Path) -> None:
    typed = "--layers every:2 --segments reference --image-size 64x32 --text-padding keep --compute-dtype float32"
    options, _ = parsed("--dataset", str(tabletop), *typed.split(), "--random-weights", "--offload", "group")
    chosen = editor_setup(options, Path("weights"))
    settings = chosen.settings
    assert (settings.layers, settings.segments, settings.image_size) == ("every:2", ("reference",), (64, 32))
    assert (settings.text_padding, settings.compute_dtype) == ("keep", "float32")
    assert (settings.random_weights, settings.blank_images, settings.mode) == (True, False, None)
    assert settings.cameras == tuple(chosen.dataset.info.cameras) == ("top",)
    assert (chosen.name, chosen.weights) == (f"tiny-{tabletop.name}", Path("weights"))
    assert chosen.hardware == Hardware(offload="group")


@pytest.mark.parametrize(
    ("typed", "error", "message"),
    [
        (["--mode", "sideways"], ConfigError, "--mode is 'sideways'"),
        (["--offload", "floppy"], ConfigError, "--offload is 'floppy'"),
        (["--camera", "nowhere"], DatasetError, "nowhere"),
    ],
)
def test_an_invalid_value_is_named(tabletop: Path, typed: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        editor_setup(parsed("--dataset", str(tabletop), *typed)[0], None)


def test_fields_of_prefix_options_with_help_are_options() -> None:
    """An option has the default of its field."""
    described = {f.name for f in dataclasses.fields(PrefixOptions) if f.metadata}
    shared = inspect.signature(takes_editor_options()(lambda options: None)).parameters
    assert described < shared.keys()
    assert {name: shared[name].default for name in described} == {
        f.name: f.default for f in dataclasses.fields(PrefixOptions) if f.name in described
    }

"""`cli.editor_options`: the shared options reach the command that asks for them, beside its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer

from imagewam_cli.cli.editor_options import EditorOptions, editor_setup, takes_editor_options
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.errors import ConfigError, DatasetError


def parsed(*arguments: str) -> tuple[EditorOptions, int]:
    """What a command with one option of its own was given."""
    app, seen = typer.Typer(), []

    @takes_editor_options()
    def command(*, options: EditorOptions, own: Annotated[int, typer.Option("--own")] = 5) -> None:
        """Command."""
        seen.append((options, own))

    app.command()(command)
    app(args=list(arguments), standalone_mode=False)
    return seen[0]


def test_without_options_nothing_is_given() -> None:
    options, own = parsed()
    assert (options, own) == (EditorOptions(), 5)
    assert options.given() == []


def test_options_reach_the_command() -> None:
    arguments = ["--editor", "tiny", "--dataset", "there", "--timestep", "0.5", "--camera", "a", "--camera", "b"]
    options, own = parsed(*arguments, "--own", "7", "--blank-images", "--image-size", "64x32")
    expected = EditorOptions(
        editor="tiny", dataset=Path("there"), timestep=0.5, camera=["a", "b"], blank_images=True, image_size="64x32"
    )
    assert (options, own) == (expected, 7)
    named = ["--editor", "--dataset", "--timestep", "--camera", "--image-size", "--blank-images"]
    assert options.given() == named


def test_settings_are_those_of_the_options(tabletop: Path) -> None:
    options = EditorOptions(
        dataset=tabletop,
        layers="every:2",
        segments="reference",
        image_size="64x32",
        text_padding="keep",
        compute_dtype="float32",
        random_weights=True,
        offload="group",
    )
    chosen = editor_setup(options, Path("weights"))
    settings = chosen.settings
    assert (settings.layers, settings.segments, settings.image_size) == ("every:2", ("reference",), (64, 32))
    assert (settings.text_padding, settings.compute_dtype) == ("keep", "float32")
    assert (settings.random_weights, settings.blank_images, settings.mode) == (True, False, None)
    assert settings.cameras == tuple(chosen.dataset.info.cameras) == ("top",)
    assert (chosen.name, chosen.weights) == (f"tiny-{tabletop.name}", Path("weights"))
    assert chosen.hardware == Hardware(offload="group")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "sideways"}, ConfigError, "mode is 'sideways'"),
        ({"offload": "floppy"}, ConfigError, "offload is 'floppy'"),
        ({"camera": ["nowhere"]}, DatasetError, "nowhere"),
    ],
)
def test_a_wrong_value_is_named(
    tabletop: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        editor_setup(EditorOptions(dataset=tabletop, **options), None)  # type: ignore[arg-type]

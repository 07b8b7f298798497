"""The embedded editor as shipped: size, parts, quality of its edits, and defaults equal to the training settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import EditorError, PluginError, UsageError
from imagewam_cli.prefix.spec import KVSpec
from imagewam_cli.registry import Registry
from imagewam_cli.sim.tabletop.edits import sample_edit
from imagewam_flux2.editor import Flux2Editor
from imagewam_tiny import architecture
from imagewam_tiny.edit import judge, sheet
from imagewam_tiny.editor import WEIGHTS

MEGABYTE = 10**6


def load(instructions: tuple[str, ...] = (), weights: Path | None = None, **settings: object) -> Flux2Editor:
    chosen = PrefixOptions(**{"cameras": ("top",)} | settings)  # type: ignore[arg-type]
    editor = load_editor("tiny", chosen, instructions=instructions, weights=weights)
    assert isinstance(editor, Flux2Editor)
    return editor


def test_weights_take_at_most_twelve_megabytes_as_safetensors() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*.safetensors")) <= 12 * MEGABYTE
    assert not list(WEIGHTS.rglob("*.bin")) + list(WEIGHTS.rglob("*.pt"))


def test_the_folder_is_a_complete_diffusers_pipeline() -> None:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline"
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    assert Registry.installed().editors.get("tiny").parameters == parameters


def test_defaults_equal_the_training_settings() -> None:
    spec: KVSpec = load().spec
    assert (spec.mode, spec.timestep, spec.text_padding) == ("prefix", architecture.PREFIX_TIMESTEP, "trim")
    assert spec.image_size == (architecture.IMAGE_SIZE, architecture.IMAGE_SIZE)


def test_edits_are_better_than_copying_the_input() -> None:
    tokens = load().tokens
    right, pictures = judge(tokens, "test", range(24))
    edits = [sample_edit(s, "test", from_start=True) for s in range(24)]
    assert np.mean(right) > 0.6, "copying the input would give 0"
    page = sheet(edits, pictures, right)
    assert page.size == (8 * 134, 3 * 402)


def test_text_has_tokens_for_the_longest_instruction() -> None:
    short, long = "put the red one on the blue zone", "pick up the orange circle and set it above the purple one"
    editor = load((short, long))
    text = {s.name: s.tokens for s in editor.spec.layers[0].segments}["text"]
    picture = {"top": np.zeros((128, 128, 3), np.uint8)}
    prefix = editor.encode([picture], [short])
    assert prefix.layers[0].k.shape[1] == text + 64
    assert prefix.valid is not None
    assert int((~prefix.valid).sum()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "denoise"}, "mode 'denoise' is not available"),
        ({"segments": ("target",)}, "no target tokens"),
        ({"image_size": (100, 100)}, "does not split into 16-pixel tokens"),
        ({"layers": "0,9"}, "the editor has layers 0 to 5"),
        ({"layers": "some"}, "layers must be"),
        ({"timestep": 2.0}, r"timestep must be in \[0, 1\]"),
    ],
)
def test_unfit_settings_are_refused_with_the_reason(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(**settings)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditorError, match="it has no transformer/"):
        load(weights=tmp_path)


def test_chosen_layers_and_segments_are_slices_of_the_whole_prefix() -> None:
    picture = {"top": sample_edit(0).before}
    instruction = "put the red one on the blue zone"
    whole = load().encode([picture], [instruction])
    some = load(layers="1,4", segments=("reference",)).encode([picture], [instruction])
    assert len(some.layers) == 2
    text = whole.layers[0].k.shape[1] - 64
    for kept, index in zip(some.layers, (1, 4), strict=True):
        assert torch.equal(kept.k, whole.layers[index].k[:, text:])


def test_random_weights_change_prefix_and_fingerprint_reproducibly() -> None:
    trained, untrained = load(), load(random_weights=True)
    assert trained.fingerprint() != untrained.fingerprint()
    picture, instruction = {"top": sample_edit(0).before}, "put the red one on the blue zone"
    a, b = (e.encode([picture], [instruction]).layers[0].k for e in (trained, untrained))
    assert not torch.allclose(a, b)
    again = load(random_weights=True).encode([picture], [instruction]).layers[0].k
    assert torch.equal(b, again)


def test_blank_images_make_the_prefix_independent_of_the_picture() -> None:
    editor = load(blank_images=True)
    instruction = "put the red one on the blue zone"
    a, b = (editor.encode([{"top": sample_edit(s).before}], [instruction]).layers[5].k for s in (0, 1))
    assert torch.equal(a, b)


def test_cameras_are_tiled_side_by_side() -> None:
    editor = load(cameras=("top", "wrist"))
    assert editor.spec.image_size == (128, 256)
    picture = sample_edit(0).before
    prefix = editor.encode([{"top": picture, "wrist": picture}], ["put the red one on the blue zone"])
    assert prefix.layers[0].k.shape[1] == editor.tokens.text(["put the red one on the blue zone"]).valid.shape[1] + 128


def test_describe_equals_the_spec_of_the_loaded_editor() -> None:
    for settings in (PrefixOptions(text_padding="keep"), PrefixOptions(layers="1,4", segments=("reference",))):
        assert installed_editor("tiny").describe(settings) == load_editor("tiny", settings).spec


def test_a_misspelt_config_key_in_an_entry_is_refused() -> None:
    entry = Registry.installed().editors.get("flux2-klein-4b")
    with pytest.raises(PluginError, match="'flux2-klein-4b' has config 'num_layrs'"):
        Flux2Editor.bound_to(dataclasses.replace(entry, config={"num_layrs": 5})).describe(PrefixOptions())

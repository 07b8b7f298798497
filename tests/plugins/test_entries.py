"""What every first-party editor says of itself before it is loaded agrees with what it is."""

from __future__ import annotations

import pytest
import torch

from imagewam_cli.diffusers_editor import DiffusersEditor
from imagewam_cli.editor import PrefixSettings
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.registry import Registry

EDITORS = list(Registry.installed().editors)


@pytest.fixture(params=EDITORS, ids=[e.name for e in EDITORS])
def entry(request: pytest.FixtureRequest) -> EditorEntry:
    found: EditorEntry = request.param
    return found


@pytest.fixture
def kind(entry: EditorEntry) -> type[DiffusersEditor]:
    found: type[DiffusersEditor] = Registry.installed().editors.load(entry.name)
    return found


def test_components_are_the_parts_that_are_loaded(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    classes = kind.part_classes()
    assert list(entry.components) == list(classes)
    for name, count in entry.components.items():
        assert (count > 0) == issubclass(classes[name], torch.nn.Module), name


def test_modes_are_those_of_the_class(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    assert entry.modes == tuple(kind.defaults.modes)


def test_parameters_are_those_of_the_described_denoiser(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    if kind.embedded is not None:
        pytest.skip("its files are counted in its own tests")
    with torch.device("meta"):
        denoiser = kind.part_classes()[entry.denoiser].from_config(entry.config)
    assert sum(p.numel() for p in denoiser.parameters()) == entry.parameters


def test_each_mode_has_a_layout_without_weights(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    for mode in entry.modes:
        spec = kind.describe(entry, PrefixSettings(mode=mode))  # type: ignore[arg-type]
        assert spec is not None
        assert spec.mode == mode
        assert spec.layers
        assert spec.bytes_per_row(2) > 0


def test_what_is_said_of_access_has_a_source(entry: EditorEntry) -> None:
    assert (entry.gated is None) == (entry.gated_source == "")

"""What every first-party editor says of itself before it is loaded agrees with what it is."""

from __future__ import annotations

import pytest
import torch

from imagewam_cli.editors import diffusers
from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.registry import Registry

EDITORS = list(Registry.installed().editors)


@pytest.fixture(params=EDITORS, ids=[e.name for e in EDITORS])
def entry(request: pytest.FixtureRequest) -> EditorEntry:
    found: EditorEntry = request.param
    return found


@pytest.fixture
def kind(entry: EditorEntry) -> type[DiffusersEditor]:
    found = installed_editor(entry.name)
    assert issubclass(found, DiffusersEditor)
    return found


def test_components_are_the_parts_that_are_loaded(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    classes = kind.part_classes()
    assert list(entry.components) == list(classes)
    for name, component in entry.components.items():
        assert (component.parameters > 0) == issubclass(classes[name], torch.nn.Module), name


def test_parameters_are_those_of_the_described_denoiser(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    if kind.embedded is not None:
        pytest.skip("its files are counted in its own tests")
    with torch.device("meta"):
        denoiser = kind.part_classes()[entry.denoiser].from_config(entry.config)
    assert sum(p.numel() for p in denoiser.parameters()) == entry.parameters


def test_each_mode_has_a_layout_without_weights(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    for mode in entry.modes:
        spec = kind.describe(PrefixOptions(mode=mode))
        assert spec is not None
        assert spec.mode == mode
        assert spec.layers
        assert spec.bytes_per_row(2) > 0


def test_entries_of_one_class_and_config_share_a_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    editors = Registry.installed().editors
    kind = installed_editor("flux2-klein-4b")
    entries = [editors.get(f"flux2-klein-{name}") for name in ("4b", "base-4b", "9b")]
    assert entries[0].config == entries[1].config != entries[2].config
    denoiser, seen = kind.part_classes()[entries[0].denoiser], []
    true = kind.attention_layers.__func__
    monkeypatch.setattr(
        kind, "attention_layers", classmethod(lambda cls, model, *rest: seen.append(model) or true(cls, model, *rest))
    )
    for entry in (*entries, entries[0]):
        kind.bound_to(entry).describe(PrefixOptions())
    assert seen[0] is seen[1] is seen[3]
    assert seen[2] is not seen[0]
    for entry, model in zip(entries, seen, strict=False):
        with torch.device("meta"):
            fresh = denoiser.from_config(entry.config).state_dict()
        told = model.state_dict()
        assert {name: (x.shape, x.dtype) for name, x in told.items()} == {
            n: (x.shape, x.dtype) for n, x in fresh.items()
        }
        assert all(x.is_meta for x in told.values())


def test_weights_are_drawn_again_once_an_editor_is_described() -> None:
    diffusers._built.cache_clear()
    installed_editor("tiny").describe(PrefixOptions())
    assert torch.nn.Linear(4, 4).weight.std() > 0
    weight = torch.zeros(4, 4)
    torch.nn.init.ones_(weight)
    assert weight.all()


def test_what_is_said_of_access_has_a_source(entry: EditorEntry) -> None:
    assert (entry.gated is None) == (entry.gated_source == "")

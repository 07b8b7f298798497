"""The entry of every first-party editor agrees with its class."""

from __future__ import annotations

import pytest
import torch

from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.editors.loading import fit
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


def test_components_equal_the_parts_of_the_class(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    classes = kind.part_classes()
    assert list(entry.components) == list(classes)
    for name, component in entry.components.items():
        assert (component.parameters > 0) == issubclass(classes[name], torch.nn.Module), name


def test_parameters_equal_those_of_the_denoiser(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    if kind.embedded is not None:
        pytest.skip("test_tiny.py counts the parameters in its files")
    with torch.device("meta"):
        denoiser = kind.part_classes()[entry.denoiser].from_config(entry.config)
    assert sum(p.numel() for p in denoiser.parameters()) == entry.parameters


def test_each_mode_is_described_without_weights(entry: EditorEntry, kind: type[DiffusersEditor]) -> None:
    for mode in entry.modes:
        spec = kind.describe(PrefixOptions(mode=mode))
        assert spec is not None
        assert spec.mode == mode
        assert spec.layers
        assert spec.bytes_per_row(2) > 0


def test_entries_with_the_same_config_share_a_described_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    editors = Registry.installed().editors
    kind = installed_editor("flux2-klein-4b")
    entries = [editors.get(f"flux2-klein-{name}") for name in ("4b", "base-4b", "9b")]
    assert entries[0].config == entries[1].config != entries[2].config
    denoiser, seen = kind.part_classes()[entries[0].denoiser], []
    original = kind.attention_layers.__func__
    monkeypatch.setattr(
        kind,
        "attention_layers",
        classmethod(lambda cls, model, *a: seen.append(model) or original(cls, model, *a)),
    )
    for entry in (*entries, entries[0]):
        kind.bound_to(entry).describe(PrefixOptions())
    assert seen[0] is seen[1] is seen[3]
    assert seen[2] is not seen[0]
    for entry, model in zip(entries, seen, strict=False):
        with torch.device("meta"):
            fresh = denoiser.from_config(entry.config).state_dict()
        state = model.state_dict()
        assert {name: (x.shape, x.dtype) for name, x in state.items()} == {
            n: (x.shape, x.dtype) for n, x in fresh.items()
        }
        assert all(x.is_meta for x in state.values())


def test_describing_an_editor_leaves_torchs_initializers_working() -> None:
    fit._meta_model.cache_clear()
    installed_editor("tiny").describe(PrefixOptions())
    assert torch.nn.Linear(4, 4).weight.std() > 0
    weight = torch.zeros(4, 4)
    torch.nn.init.ones_(weight)
    assert weight.all()


def test_gated_editors_name_their_source(entry: EditorEntry) -> None:
    assert (entry.gated is None) == (entry.gated_source == "")

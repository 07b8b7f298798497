"""Test `kvcache.format.provenance`: the compared fields and the reported differences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from imagewam_cli.data.augmentation import Augmentation
from imagewam_cli.data.types import KeyMap
from imagewam_cli.kvcache.format.provenance import Difference, Provenance, fingerprint_digest
from tests.support.arithmetic_editor import ArithmeticEditor

FINGERPRINT = ArithmeticEditor().fingerprint()
WHOLE = Provenance(
    dataset="a" * 64,
    content="e" * 32,
    stride=2,
    augmentation=Augmentation(),
    keys=KeyMap(cameras=("top",)),
    selected="0-9",
    codec="fp32",
    fingerprint=FINGERPRINT,
    spec=ArithmeticEditor().spec,
    table="c" * 32,
)


def test_the_same_provenance_has_no_difference() -> None:
    assert WHOLE.differences(dataclasses.replace(WHOLE)) == ()


def test_every_field_has_a_test_case() -> None:
    cases = next(
        m for m in test_each_field_is_compared_and_named_with_both_values.pytestmark if m.name == "parametrize"
    ).args[1]
    named = {key for change, _ in cases for key in change}
    assert named | {"editor", "digest"} == {field.name for field in dataclasses.fields(Provenance)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dataset": "b" * 64}, Difference("dataset", "a" * 16, "b" * 16)),
        ({"content": "f" * 32}, Difference("files of the dataset", "e" * 16, "f" * 16)),
        ({"stride": 3}, Difference("stride", 2, 3)),
        (
            {"augmentation": Augmentation(variants=3)},
            Difference("augmentation", Augmentation(), Augmentation(variants=3)),
        ),
        ({"keys": KeyMap(cameras=("wrist",))}, Difference("dataset keys", WHOLE.keys, KeyMap(cameras=("wrist",)))),
        ({"selected": "all"}, Difference("selection of episodes", "0-9", "all")),
        ({"codec": "bf16"}, Difference("codec", "fp32", "bf16")),
        ({"fingerprint": FINGERPRINT | {"editor": "tiny"}}, Difference("editor", "arithmetic", "tiny")),
        ({"fingerprint": FINGERPRINT | {"recipe": {"a": 1}}}, Difference("editor recipe", None, {"a": 1})),
        ({"spec": ArithmeticEditor(timestep=0.5).spec}, Difference("prefix layout", "timestep 0.0", "timestep 0.5")),
        ({"table": "d" * 32}, Difference("states or actions", "c" * 16, "d" * 16)),
    ],
)
def test_each_field_is_compared_and_named_with_both_values(change: dict[str, Any], expected: Difference) -> None:
    assert WHOLE.differences(dataclasses.replace(WHOLE, **change)) == (expected,)


def test_settings_are_named_one_by_one() -> None:
    other = Provenance(fingerprint=ArithmeticEditor(timestep=0.5).fingerprint())
    assert Provenance(fingerprint=FINGERPRINT).differences(other) == (Difference("setting 'timestep'", 0.0, 0.5),)


def test_the_origin_of_the_weights_is_not_compared() -> None:
    assert not WHOLE.differences(dataclasses.replace(WHOLE, fingerprint=FINGERPRINT | {"revision": "e" * 40}))


def test_unknown_fields_are_not_compared() -> None:
    assert not WHOLE.differences(Provenance())
    assert not Provenance(stride=2).differences(WHOLE)


def test_shortened_checksums_and_a_digest_can_be_compared() -> None:
    stored = Provenance(dataset="a" * 16, table="c" * 16, editor="arithmetic", digest=fingerprint_digest(FINGERPRINT))
    assert not stored.differences(WHOLE)
    found = stored.differences(dataclasses.replace(WHOLE, dataset="b" * 64, fingerprint=FINGERPRINT | {"weights": "f"}))
    assert [difference.what for difference in found] == ["dataset", "editor fingerprint"]


def test_fingerprints_with_different_digests_have_differences() -> None:
    """Every difference that changes the digest is also found by comparing the fingerprints."""
    for key in FINGERPRINT.keys() - {"revision"}:
        other = {**FINGERPRINT, key: {"another": 1}}
        assert fingerprint_digest(other) != fingerprint_digest(FINGERPRINT)
        assert Provenance(fingerprint=FINGERPRINT).differences(Provenance(fingerprint=other))


def test_what_an_older_one_did_not_record_is_not_compared_but_named() -> None:
    older = dataclasses.replace(WHOLE, content=None)
    assert older.differences(WHOLE) == ()
    assert older.unrecorded(WHOLE) == ("files of the dataset",)
    assert WHOLE.unrecorded(older) == WHOLE.unrecorded(WHOLE) == ()

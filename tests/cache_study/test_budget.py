"""Test `cache_study.budget`: precision is reduced first, then tokens are pooled, then layers dropped."""

from __future__ import annotations

import dataclasses

import pytest

from imagewam_cli.cache_study.budget import best_codecs, choices, fitting
from imagewam_cli.cache_study.fidelity import compare_candidates, storage_candidates
from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT32
from imagewam_cli.kvcache.codecs.integer import INT4
from imagewam_cli.kvcache.codecs.pca import PCA2
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec
from tests.support.one_layer import layer, spec_of

CODECS = {"fp32": FLOAT32, "bf16": BFLOAT16, "int4": INT4}
COUNTS = {"rows": 1000, "instructions": 3}


@pytest.fixture
def deep(prefix: PrefixKV) -> tuple[KVSpec, PrefixKV]:
    """A layout of five layers, and a prefix with it."""
    layers = tuple(dataclasses.replace(layer(), name=name) for name in "abcde")
    return dataclasses.replace(spec_of(layer()), layers=layers), PrefixKV(prefix.layers * 5, prefix.valid)


def test_each_choice_has_the_size_and_error_of_storing_it(deep: tuple[KVSpec, PrefixKV]) -> None:
    found = {(c.codec, c.pool): c for c in choices(*deep, CODECS, **COUNTS) if c.layers == "all"}
    for setting in compare_candidates(*deep, storage_candidates(deep[0], CODECS.values())):
        choice = found[setting.codec, setting.pool]
        assert (choice.bytes_per_row, choice.total_bytes) == (
            setting.bytes_per_row,
            COUNTS["rows"] * setting.bytes_per_row,
        )
        assert choice.attention == setting.attention


def test_fitted_codecs_need_sample_rows(deep: tuple[KVSpec, PrefixKV]) -> None:
    codecs = {**CODECS, "pca2": PCA2}
    assert "pca2" not in {c.codec for c in choices(*deep, codecs, **COUNTS)}
    found = [c for c in choices(*deep, codecs, **COUNTS, samples=[deep[1]]) if c.codec == "pca2"]
    assert len(found) == 8
    assert all(0 < c.attention < 1 for c in found)


def test_precision_is_reduced_before_tokens_and_tokens_before_layers(deep: tuple[KVSpec, PrefixKV]) -> None:
    tried = choices(*deep, CODECS, **COUNTS)
    order = [(layers, pool) for layers in ("all", "every:2", "every:4", "every:8") for pool in (1, 2)]
    assert [(c.layers, c.pool) for c in best_codecs(tried)] == order
    sizes = {(c.codec, c.pool, c.layers): c.total_bytes for c in tried}
    for room, expected in (
        (("fp32", 1, "all"), ("fp32", 1, "all")),
        (("bf16", 1, "all"), ("bf16", 1, "all")),
        (("int4", 1, "all"), ("int4", 1, "all")),
        (("int4", 2, "all"), ("int4", 2, "all")),
        (("int4", 1, "every:4"), ("int4", 2, "every:2")),
        (("int4", 2, "every:4"), ("int4", 2, "every:4")),
    ):
        first = fitting(tried, sizes[room])[0]
        assert (first.codec, first.pool, first.layers) == expected
    less_precise = fitting(tried, sizes["int4", 1, "all"])
    # A choice with fewer layers may show a smaller error, because dropped layers do not count in it. It must not win.
    assert any(c.attention < less_precise[0].attention for c in less_precise if c.layers != "all")


def test_exactly_the_choices_within_the_budget_are_returned(deep: tuple[KVSpec, PrefixKV]) -> None:
    tried = choices(*deep, CODECS, **COUNTS)
    for budget in {c.total_bytes for c in tried}:
        found = fitting(tried, budget)
        assert set(found) == {c for c in tried if c.total_bytes <= budget}
    assert fitting(tried, min(c.total_bytes for c in tried) - 1) == ()


def test_equal_sets_of_layers_are_tried_once(prefix: PrefixKV) -> None:
    assert {c.layers for c in choices(spec_of(layer()), prefix, CODECS, **COUNTS)} == {"all"}


def test_choices_of_the_user_are_kept(deep: tuple[KVSpec, PrefixKV]) -> None:
    found = choices(*deep, CODECS, **COUNTS, layers="0,1,4,5,9", pool=3)
    assert {(c.layers, c.pool) for c in found} == {("0,1,4,5,9", 3)}
    assert found[0].options == "--codec fp32 --pool 3 --layers 0,1,4,5,9"

"""`evaluation.budget`: the least error that fits, and layers only where they must go."""

from __future__ import annotations

import dataclasses

import pytest

from imagewam_cli.editor import PrefixKV
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.budget import within_budget
from imagewam_cli.evaluation.fidelity import compare_ways, ways
from imagewam_cli.kvcache.codec import BFLOAT16, FLOAT32
from imagewam_cli.kvcache.compact import INT4

from .test_fidelity import layer, prefix, spec_of

__all__ = ["prefix"]
CODECS = {"fp32": FLOAT32, "bf16": BFLOAT16, "int4": INT4}
ROWS = 1000


def test_more_room_loses_less_until_nothing_is_lost(prefix: PrefixKV) -> None:
    spec = spec_of(layer())
    sizes = sorted(ROWS * s.bytes_per_row for s in compare_ways(spec, prefix, ways(spec, CODECS.values())))
    errors = [within_budget(spec, prefix, CODECS, rows=ROWS, budget=size).attention for size in sizes]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0
    for size in sizes:
        assert within_budget(spec, prefix, CODECS, rows=ROWS, budget=size).total_bytes <= size


def test_layers_go_only_where_nothing_fits_with_all_of_them(prefix: PrefixKV) -> None:
    four = dataclasses.replace(spec_of(layer()), layers=tuple(dataclasses.replace(layer(), name=n) for n in "abcd"))
    deep = PrefixKV(prefix.layers * 4, prefix.valid)
    least = min(ROWS * s.bytes_per_row for s in compare_ways(four, deep, ways(four, CODECS.values())))
    assert within_budget(four, deep, CODECS, rows=ROWS, budget=least).layers == "all"
    assert within_budget(four, deep, CODECS, rows=ROWS, budget=least - 1).layers == "every:2"


def test_what_nothing_fits_is_told_with_the_least(prefix: PrefixKV) -> None:
    with pytest.raises(UsageError, match=r"nothing fits 1e-09 GB: --codec int4 --pool 2 --layers every:\d still needs"):
        within_budget(spec_of(layer()), prefix, CODECS, rows=ROWS, budget=1)

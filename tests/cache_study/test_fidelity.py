"""Test `cache_study.fidelity` against numpy, torch's attention, and cases with known errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagewam_cli.cache_study.fidelity import compare, compare_candidates, layer_errors, round_trip, storage_candidates
from imagewam_cli.cli.app import run
from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT32
from imagewam_cli.kvcache.codecs.integer import INT4
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.pooling import pooled_prefix
from tests.support.one_layer import HEADS, SIZE, layer, spec_of


def test_exact_numbers_have_no_error(prefix: PrefixKV) -> None:
    (errors,) = compare(spec_of(layer()), prefix, round_trip(FLOAT32, spec_of(layer()), prefix))
    assert (errors.k, errors.v, errors.attention) == (0.0, 0.0, 0.0)


def test_errors_of_keys_and_values_are_relative_to_their_size(prefix: PrefixKV) -> None:
    (kv,) = prefix.layers
    errors = layer_errors(layer(), kv, LayerKV(kv.k * 1.1, kv.v * 0.75), (prefix.valid, prefix.valid))
    assert errors.k == pytest.approx(0.1, rel=1e-5)
    assert errors.v == pytest.approx(0.25, rel=1e-5)


def test_padding_does_not_count_as_error(prefix: PrefixKV) -> None:
    (kv,), valid = prefix.layers, prefix.valid
    assert valid is not None
    noisy = LayerKV(kv.k + 9.0 * (~valid)[:, :, None, None], kv.v + 9.0 * (~valid)[:, :, None, None])
    errors = layer_errors(layer(), kv, noisy, (valid, valid))
    assert (errors.k, errors.v, errors.attention) == (0.0, 0.0, 0.0)


def test_attention_matches_torch(prefix: PrefixKV) -> None:
    """The queries are evenly spaced valid keys of the same row."""
    (kv,), valid = prefix.layers, prefix.valid
    assert valid is not None
    other = round_trip(INT4, spec_of(layer()), prefix)
    outputs = []
    for one in (kv, other.layers[0]):
        rows = []
        for i in range(3):
            tokens = np.nonzero(valid[i].numpy())[0]
            spaced = tokens[np.linspace(0, len(tokens) - 1, 32).round().astype(int)]
            q, k, v = (x.transpose(0, 1)[None] for x in (kv.k[i, spaced], one.k[i, tokens], one.v[i, tokens]))
            rows.append(F.scaled_dot_product_attention(q, k, v).numpy())
        outputs.append(np.stack(rows))
    expected = np.sqrt(np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum())
    (errors,) = compare(spec_of(layer()), prefix, other)
    assert errors.attention == pytest.approx(float(expected), rel=1e-4)
    assert errors.attention > 0.01


def test_pooling_equal_neighbours_is_exact() -> None:
    one = layer(text=False)
    cells = torch.randn(2, 2, 3, HEADS, SIZE, generator=torch.Generator().manual_seed(0))
    alike = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    spec, exact = spec_of(one), PrefixKV((LayerKV(alike, alike),), None)
    small, pooled = pooled_prefix(spec, exact, 2)
    assert small.layers[0].segments[0].grid == (2, 3)
    assert torch.allclose(pooled.layers[0].k, cells.flatten(1, 2), atol=1e-6)
    (errors,) = compare(spec, exact, pooled)
    assert (errors.k, errors.v) == (None, None)
    assert errors.attention < 1e-5


def test_every_codec_is_tried_with_and_without_pooling(prefix: PrefixKV) -> None:
    spec = spec_of(layer())
    found = {
        (s.codec, s.pool): s for s in compare_candidates(spec, prefix, storage_candidates(spec, (FLOAT32, BFLOAT16)))
    }
    assert set(found) == {("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2)}
    # K and V of 29 tokens, or of 5 and 6 cells, with 16 numbers each, plus valid and five numbers of the index
    assert found["fp32", 1].bytes_per_row == 2 * 29 * 16 * 4 + 29 + 48
    assert found["bf16", 2].bytes_per_row == 2 * 11 * 16 * 2 + 11 + 48
    assert found["fp32", 1].attention == 0.0
    assert 0 < found["bf16", 1].attention < found["bf16", 2].attention


def test_a_report_of_a_real_cache(
    tiny_cache: Path, tiny_weights: Path, policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", str(tiny_cache), "--weights", str(tiny_weights), "--run", str(policy_folder)]
    arguments += ["--rows", "10", "--plot", str(tmp_path / "report.png"), "--format", "json"]
    assert run(["-q", "cache", "report", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    manifest = CacheReader(tiny_cache).manifest
    assert [e["layer"] for e in report["layers"]] == [layer.name for layer in manifest.spec.layers]
    assert all(e["k"] < 1e-5 and e["attention"] < 1e-5 for e in report["layers"]), "an fp32 cache has errors"
    assert report["rows"] == 10
    assert report["policy"]["action"] < 1e-4
    errors = {(s["codec"], s["pool"]): s["attention"] for s in report["settings"]}
    assert errors["fp32", 1] == 0.0
    assert errors["fp32", 1] < errors["fp16", 1] < errors["bf16", 1] < errors["int8", 1] < errors["int4", 1]
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_stored_numbers_with_errors_change_a_policys_actions(
    tiny_cache: Path, tiny_weights: Path, policy_folder: Path, tabletop: Path
) -> None:
    from imagewam_cli.cache_study.fidelity import policy_change
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.policy.policy import Policy

    policy, reader = Policy.load(policy_folder, weights=tiny_weights), CacheReader(tiny_cache)
    rows = list(open_dataset(tabletop).rows(episodes=[0], stride=4))[:4]
    exact = reader.read(np.arange(4))
    same = policy_change(policy, rows, exact, exact)
    assert (same.action, same.exact_loss) == (0.0, same.stored_loss)
    twice = dataclasses.replace(exact, layers=tuple(LayerKV(kv.k, 2 * kv.v) for kv in exact.layers))
    assert policy_change(policy, rows, exact, twice).action > 0

"""Compare values read from dataset_stats.json with scales, offsets and normalised windows of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from imagewam_cli.data.normalization import NormalizationMode, Normalizer
from imagewam_cli.errors import DatasetError
from imagewam_cli.published.statistics import read_statistics
from tests.support.paths import FIXTURES

PUBLISHED = FIXTURES / "published"
MODES: tuple[tuple[str, NormalizationMode], ...] = (
    ("min_max", "min_max"),
    ("q01_q99", "quantile"),
    ("z-score", "mean_std"),
)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return load_file(PUBLISHED / "normalizer.safetensors")


@pytest.mark.parametrize(("theirs", "mode"), MODES)
def test_normalised_values_are_the_published_ones(published: Any, theirs: str, mode: NormalizationMode) -> None:
    state, action = (
        Normalizer(mode=mode, stats=s, rule="absolute") for s in read_statistics(PUBLISHED / "dataset_stats.json")
    )
    for field, normalizer in (("state", state), ("action", action)):
        np.testing.assert_allclose(normalizer.scale, published[f"{theirs}.{field}.scale"], rtol=1e-5)
        np.testing.assert_allclose(normalizer.offset, published[f"{theirs}.{field}.offset"], rtol=1e-5, atol=1e-6)
    back = action.denormalize(published[f"{theirs}.denorm_in"])
    np.testing.assert_allclose(back, published[f"{theirs}.denorm_out"], rtol=1e-5, atol=1e-5)
    kept = ~published["w0.action_is_pad"]
    forward = action.normalize(published["w0.raw_action"])[kept]
    np.testing.assert_allclose(forward, published[f"{theirs}.w0.action"][kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "contains no statistics"),
        (
            json.dumps({"type": "per_embodiment", "embodiments": {"a": {}, "b": {}}}),
            "separate statistics for the robots a, b",
        ),
        (json.dumps({"state": {"default": {}}, "action": {"default": {}}}), "state lack 'global_min'"),
        (json.dumps({"state": {}, "action": {}}), "must have exactly one set of state statistics"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dataset_stats.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_statistics(path)

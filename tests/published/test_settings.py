"""Test reading train_config.yaml: values at any depth, and refused files."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagewam_cli.errors import ConfigError
from imagewam_cli.published.settings import TrainSettings, read_train_config


def read(tmp_path: Path, text: str) -> TrainSettings:
    path = tmp_path / "train_config.yaml"
    path.write_text(text)
    return read_train_config(path)


def test_values_are_found_by_key_at_any_depth(tmp_path: Path) -> None:
    text = """
    data: {train: {num_frames: 33}, val: {num_frames: "${data.train.num_frames}"}}
    model: {pack_proprio_after_text: false, qwen_context_len: 128}
    eval_num_inference_steps: 20
    """
    expected = TrainSettings(placement="appended", text_tokens=128, horizon=32, inference_steps=20)
    assert read(tmp_path, text) == expected


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 1") == TrainSettings(placement="packed", text_tokens=512, inference_steps=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {num_frames: 17}\nb: {num_frames: 33}", "num_frames has 2 values: 17, 33"),
        ("num_frames: many", "num_frames is 'many', not a number"),
        ("pack_proprio_after_text: 3", "not a yes or no"),
        ("a: [", "not valid YAML"),
    ],
)
def test_ambiguous_or_invalid_values_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)

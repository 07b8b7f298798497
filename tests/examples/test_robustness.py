"""Run short robustness campaigns. The scripts themselves run full ones."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import EXAMPLES

FOLDER = EXAMPLES / "robustness"


def run(script: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_FILE = ("--editor", "instruct-pix2pix", "--codec", "pca1")
"""A fitted codec and layers stored per instruction, which have files beside the row shards."""


@pytest.mark.slow
def test_killed_builds_resume_to_the_uninterrupted_cache() -> None:
    printed = run("kills.py", "--kills", "8", "--stride", "16", "--shard-mb", "0.02", *EVERY_FILE)
    assert "8 kills, " in printed
    assert " 0 of them differ from the uninterrupted build" in printed
    for file in ("codec.safetensors", "shards/instructions.safetensors"):
        assert f"as soon as {file} exists\n" in printed


@pytest.mark.slow
def test_flipped_bits_are_found() -> None:
    printed = run("flips.py", "--flips", "30", "--command-line", "1", *EVERY_FILE)
    assert "   30  verify: found" in printed
    # the reader needs every file except those that describe the dataset
    counts = {what: int(count) for count, what in re.findall(r"^ *(\d+)  (.+)$", printed, re.MULTILINE)}
    described = sum(counts.get(f"in {name}", 0) for name in ("dataset_files.json", "dataset.sha256"))
    assert counts["reader: found"] == 30 - described > 20
    assert "0 missed" in printed
    for file in ("codec", "instructions", "shard-00000", "manifest.json"):
        assert f"in {file}" in printed


@pytest.mark.slow
def test_merged_parts_of_killed_builds_equal_a_single_build() -> None:
    printed = run("parts.py", "--ways", "parts", "--parts", "2", "--episodes", "6")
    assert "parts: part 1 killed; all " in printed
    assert "equal the single-process build" in printed

"""Artifacts that were made before caches and runs recorded the files of their dataset still work, with one warning.

`tests/fixtures/before_identity/README.md` says what they are. The numbers to compare with were computed by the code of
that time, perhaps on another CPU, so they agree within rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from imagewam_cli.cli.app import run
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import BFLOAT16
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.policy.policy import Policy
from imagewam_cli.training.metrics import read_metrics
from tests.support.paths import FIXTURES

OLD = FIXTURES / "before_identity"
DATASET = OLD / "dataset"
BUILD = ["cache", "--editor", "tiny", "--dataset", str(DATASET), "--image-size", "32x32", "--layers", "1"]
BUILD += ["--segments", "reference", "--batch", "4", "--shard-mb", "0.02"]
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
"""Difference between CPUs that multiply float32 in different orders."""
STORED = {"rtol": 2**-7, "atol": 1e-4}
"""The same, where a rounding to bfloat16 turns the other way."""


@pytest.fixture
def expected() -> Any:
    return json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "cache", tmp_path / "cache"))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


class TestCache:
    def test_an_old_build_is_continued(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([*BUILD, "--out", str(cache)]) == 0
        (warning,) = warnings_in(capsys.readouterr().err)
        assert "was begun by an older imagewam, which did not record the files of the dataset" in warning
        for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
            assert (cache / "shards" / name).read_bytes() == (OLD / "cache" / "shards" / name).read_bytes()
        here = load_file(cache / "shards" / "shard-00002.safetensors")
        there = load_file(OLD / "expected-shard-00002.safetensors")
        assert here.keys() == there.keys()
        for name in here.keys() - {"checksum"}:
            np.testing.assert_allclose(here[name].float(), there[name].float(), **STORED, err_msg=name)

    def test_what_the_old_build_read_is_not_recorded_afterwards(self, cache: Path) -> None:
        assert run(["-q", *BUILD, "--out", str(cache)]) == 0
        manifest = read_manifest(cache)
        assert manifest.complete
        assert manifest.dataset.content is None
        assert set(manifest.files) == {"table.safetensors", "samples.safetensors"}

    def test_it_is_compared_by_its_metadata(
        self, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = Path(shutil.copytree(DATASET, tmp_path / "other"))
        tasks = other / "meta" / "tasks.jsonl"
        tasks.write_text(tasks.read_text(encoding="utf-8").replace("drawer", "window"), encoding="utf-8")
        episodes = other / "meta" / "episodes.jsonl"
        episodes.write_text(episodes.read_text(encoding="utf-8").replace("drawer", "window"), encoding="utf-8")
        arguments = [str(other) if part == str(DATASET) else part for part in BUILD]
        assert run([*arguments, "--out", str(cache)]) == 1
        assert "differs in its dataset" in capsys.readouterr().err

    def test_verify_says_that_the_dataset_was_not_compared(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["-q", "cache", "verify", "--cache", str(cache), "--dataset", str(DATASET)]) == 0
        assert "the dataset was not compared: the cache has no record of its files" in capsys.readouterr().out


class TestRun:
    def assert_continued(self, folder: Path, expected: Any) -> None:
        losses = {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl")}
        assert list(losses) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(list(losses.values()), list(expected["losses"].values()), **ROUNDING)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))["validation"]
        np.testing.assert_allclose(list(result.values()), [expected["validation"][key] for key in result], **ROUNDING)

    def test_an_old_run_is_continued_on_its_cache(self, cache: Path, begun: Path, expected: Any) -> None:
        arguments = ["--cache", str(cache), "--config", str(OLD / "run" / "config.yaml"), "--out", str(begun)]
        assert run(["-q", "train-expert", *arguments]) == 0
        self.assert_continued(begun, expected)

    def test_an_old_run_is_continued_on_a_new_cache_with_one_warning(
        self, begun: Path, tmp_path: Path, expected: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        new = tmp_path / "new"
        self.build_two_shards(new)
        assert read_manifest(new).dataset.content is not None
        arguments = ["--cache", str(new), "--config", str(OLD / "run" / "config.yaml"), "--out", str(begun)]
        assert run(["train-expert", *arguments]) == 0
        (warning,) = warnings_in(capsys.readouterr().err)
        assert "was begun by an older imagewam, which did not record the files of the dataset" in warning
        self.assert_continued(begun, expected)

    def build_two_shards(self, out: Path) -> None:
        """Build a cache with the old one's settings, and interrupt it after the same shards."""
        dataset, settings = open_dataset(DATASET), read_manifest(OLD / "cache").settings
        editor = load_editor("tiny", settings, instructions=instructions_of(dataset))
        done = 0

        def stop(rows: int) -> None:
            nonlocal done
            done += rows
            if done > 12:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_cache(dataset, editor, out, BFLOAT16, BuildSettings(batch=4, shard_mb=0.02), on_rows=stop)


class TestBundle:
    def test_an_old_bundle_acts_as_before(self, expected: Any) -> None:
        chunks = Policy.load(OLD / "bundle").chunks(Samples.load(OLD / "bundle" / SAMPLES).observations)
        np.testing.assert_allclose(chunks, expected["chunks"], **ROUNDING)

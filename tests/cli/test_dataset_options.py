"""`cli.dataset_options`: every command that reads a dataset takes the same options, and a cache remembers them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.cli.dataset_options import DatasetOptions
from imagewam_cli.data.types import KeyMap
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.manifests import read_manifest
from tests.support.recordings import record, write_v21

SMALL = ["--image-size", "64x64", "--stride", "40", "--layers", "0", "--codec", "fp32", "--shard-mb", "0.1"]


def build(dataset: Path, weights: Path, out: Path, *options: str) -> int:
    places = ["--dataset", str(dataset), "--weights", str(weights), "--out", str(out)]
    return run(["-q", "cache", *places, *SMALL, *options])


@pytest.fixture(scope="module")
def some_episodes(tabletop: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of episodes 1 and 3 of five."""
    out = tmp_path_factory.mktemp("some") / "cache"
    assert build(tabletop, tiny_weights, out, "--only-episodes", "1-3", "--exclude-episodes", "2") == 0
    return out


def test_options_replace_only_the_keys_that_they_name() -> None:
    known = KeyMap(state="s", action="a", cameras=("top",), instruction="i")
    assert DatasetOptions().keys(known) == known
    assert DatasetOptions().keys() == KeyMap()
    given = DatasetOptions(action_key="b", camera=["left", "right"])
    assert given.keys(known) == KeyMap(state="s", action="b", cameras=("left", "right"), instruction="i")
    assert given.given() == ["--camera", "--action-key"]


def test_a_cache_holds_the_chosen_episodes_and_says_which(some_episodes: Path) -> None:
    manifest = read_manifest(some_episodes)
    assert (manifest.dataset.selected, manifest.dataset.episodes) == ("1,3", 2)
    reader = CacheReader(some_episodes)
    assert sorted(set(reader.index.episode.tolist())) == [1, 3]
    assert manifest.dataset.rows == len(reader.table.state)


def test_a_build_of_other_episodes_does_not_resume_it(
    some_episodes: Path, tabletop: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tabletop, tiny_weights, some_episodes) == 1
    assert "differs in its selection of episodes: 1,3, but this build has all" in capsys.readouterr().err
    assert build(tabletop, tiny_weights, some_episodes, "--only-episodes", "1,3") == 0


def test_a_cache_is_repaired_from_its_own_episodes(some_episodes: Path, tiny_weights: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(some_episodes, tmp_path / "cache"))
    for file in (sorted((damaged / "shards").iterdir())[0], damaged / "table.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    verify = ["-q", "cache", "verify", "--cache", str(damaged), "--weights", str(tiny_weights)]
    assert run([*verify, "--repair"]) == 0
    for file in sorted(path for path in some_episodes.rglob("*.safetensors")):
        assert (damaged / file.relative_to(some_episodes)).read_bytes() == file.read_bytes()


def test_info_counts_the_chosen_episodes(tabletop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(tabletop), "--exclude-episodes", "0-3", "--format", "json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["episodes"] == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "--policy", "random", "--only-episodes", "0"], "--only-episodes has no effect without --dataset"),
        (["info", "CACHE", "--state-key", "x"], "--state-key has no effect without a dataset"),
        (["train-expert", "--cache", "CACHE", "--instruction-key", "x"], "--instruction-key has no effect without"),
        (["cache", "--dataset", "DATASET", "--only-episodes", "first"], "--only-episodes must look like 0-9,12"),
    ],
)
def test_an_option_without_effect_or_meaning_is_refused(
    some_episodes: Path, tabletop: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    places = {"CACHE": str(some_episodes), "DATASET": str(tabletop)}
    assert run([places.get(word, word) for word in command]) == 2
    assert message in capsys.readouterr().err


def test_an_episode_that_does_not_exist_is_refused(tabletop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "plan", "--dataset", str(tabletop), "--only-episodes", "3-9"]) == 1
    printed = capsys.readouterr().err
    assert "has no episode 5, which --only-episodes names" in printed
    assert "hint: it has 5 episodes: 0-4" in printed


def test_hints_of_a_repair_name_no_option_that_it_lacks(
    some_episodes: Path, tabletop: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache needs every episode that it holds."""
    broken, dataset = (Path(shutil.copytree(a, tmp_path / b)) for a, b in ((some_episodes, "c"), (tabletop, "d")))
    (broken / "table.safetensors").unlink()
    next(dataset.glob("data/*/*.parquet")).unlink()
    where = ["--cache", str(broken), "--dataset", str(dataset), "--weights", str(tiny_weights)]
    assert run(["-q", "cache", "verify", *where, "--repair"]) == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    assert hint
    assert "--exclude-episodes" not in hint
    assert "--only-episodes" not in hint


def test_a_fault_in_an_episode_that_is_left_out_stops_no_command(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Episode 1 has no length, no rows and no video. What reads the others works, and the cache is found intact."""
    dataset, cache, trained = write_v21(tmp_path / "set", record()), tmp_path / "cache", tmp_path / "run"
    for file in dataset.glob("**/episode_000001.*"):
        file.unlink()
    episodes = dataset / "meta/episodes.jsonl"
    episodes.write_text(episodes.read_text().replace('"length": 7', '"length": 0'))
    others = ["--dataset", str(dataset), "--exclude-episodes", "1"]
    weights = ["--weights", str(tiny_weights)]
    small = ["--image-size", "64x64", "--stride", "2", "--layers", "0"]
    assert run(["cache", "plan", *others, *small, *weights]) == 0
    assert run(["cache", *others, *small, *weights, "--out", str(cache)]) == 0
    assert run(["cache", "verify", "--cache", str(cache)]) == 0
    assert run(["cache", "report", "--cache", str(cache), "--rows", "2", *weights]) == 0
    steps = ["--steps", "1", "--batch", "2"]
    assert run(["train-expert", "--online", *others, *small, *weights, *steps, "--out", str(trained)]) == 0
    assert run(["eval", "--policy", str(trained), *others, *weights]) == 0
    assert run(["attention", "--policy", str(trained), *others, *weights, "--rows", "4", "--target", "end"]) == 0
    assert run(["info", str(dataset), "--exclude-episodes", "1"]) == 0
    capsys.readouterr()
    assert run(["eval", "--policy", str(trained), "--dataset", str(dataset), *weights]) == 1
    assert "--exclude-episodes 1" in capsys.readouterr().err

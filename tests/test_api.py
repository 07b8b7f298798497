"""Test the Python API: each function does what its command does and raises the errors that its command prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import imagewam_cli as iw
from imagewam_cli.cli import app
from imagewam_cli.errors import CacheError, ConfigError, DatasetError, RunError, UnknownNameError
from imagewam_cli.policy.acting import RandomPolicy
from tests.support.folders import files

SMALL = iw.PrefixOptions(image_size=(64, 64))
RECIPE = {"steps": 2, "batch": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tabletop: Path, tiny_weights: Path) -> Path:
    folder = tmp_path_factory.mktemp("api") / "cache"
    data = iw.open_dataset(tabletop)
    editor = iw.load_editor("tiny", dataset=data, options=SMALL, weights=tiny_weights)
    assert len(iw.build_cache(data, editor, folder, codec="int8", stride=8, batch=8)) > 0
    return folder


def test_a_cache_has_the_same_bytes_as_the_commands(
    cache: Path, tmp_path: Path, tabletop: Path, tiny_weights: Path
) -> None:
    options = [
        "--weights",
        str(tiny_weights),
        "--image-size",
        "64x64",
        "--codec",
        "int8",
        "--stride",
        "8",
        "--batch",
        "8",
    ]
    assert app.run(["cache", "--dataset", str(tabletop), "--out", str(tmp_path / "cache"), *options]) == 0
    assert files(tmp_path / "cache") == files(cache)


def test_rows_are_read_by_number(cache: Path) -> None:
    reader = iw.open_cache(str(cache))
    two, one = reader.read([0, 3]), reader.read(np.array([3]))
    assert two.batch == 2
    np.testing.assert_array_equal(two.layers[0].k[1], one.layers[0].k[0])


def test_a_run_equals_the_commands_and_its_policy_acts(
    cache: Path, tmp_path: Path, tabletop: Path, tiny_weights: Path
) -> None:
    run = iw.train(iw.open_cache(cache), tmp_path / "python", **RECIPE)
    code = app.run(
        ["train-expert", "--cache", str(cache), "--out", str(tmp_path / "cli"), "--steps", "2", "--batch", "4"]
    )
    assert code == 0
    for path in (tmp_path / "cli" / "policy").glob("*.safetensors"):
        assert path.read_bytes() == (run.folder / "policy" / path.name).read_bytes()
    assert run.metrics()[-1]["step"] == 2
    assert run.validation is not None
    policy = iw.load_policy(run, weights=tiny_weights)
    data = iw.open_dataset(tabletop)
    action = policy.act(next(data.rows()).observation())
    assert action.shape == (data.info.action_dim,)
    compared = iw.open_loop(policy, data, episodes=1)
    assert len(compared.per_action) == data.info.action_dim
    result = iw.evaluate(policy, episodes=1, splits=["test"])
    assert result.splits["test"].total.success.trials == 1
    report = iw.export_policy(run, tmp_path / "bundle", format="bundle", weights=tiny_weights)
    assert "policy.json" in report.files


def test_a_run_resumes_and_another_recipe_is_refused(cache: Path, tmp_path: Path) -> None:
    iw.train(cache, tmp_path / "run", **RECIPE)
    assert iw.train(cache, tmp_path / "run", **RECIPE).metrics()[-1]["step"] == 2
    with pytest.raises(RunError, match="batch"):
        iw.train(cache, tmp_path / "run", steps=2, batch=5)


def test_functions_raise_the_errors_of_their_commands(cache: Path, tmp_path: Path, tabletop: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        iw.open_dataset(tmp_path / "nowhere")
    with pytest.raises(UnknownNameError, match="unknown editor 'tinny'"):
        iw.load_editor("tinny")
    with pytest.raises(CacheError):
        iw.open_cache(tabletop)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        iw.train(cache, tmp_path / "run", steps=0)
    with pytest.raises(UnknownNameError, match="split"):
        iw.evaluate(RandomPolicy(3), splits=["weekend"])
    assert not (tmp_path / "run").exists()


def test_demonstrations_are_recorded_and_opened(tmp_path: Path) -> None:
    data = iw.record(tmp_path / "set", episodes=2, seed=7)
    assert data.info.total_episodes == 2
    assert list(data.info.cameras) == ["top"]


def test_an_editor_without_the_datasets_instructions_says_what_to_do(
    tmp_path: Path, tabletop: Path, tiny_weights: Path
) -> None:
    data = iw.open_dataset(tabletop)
    editor = iw.load_editor(
        "tiny", options=iw.PrefixOptions(image_size=(64, 64), cameras=("top",)), weights=tiny_weights
    )
    with pytest.raises(CacheError) as error:
        iw.build_cache(data, editor, tmp_path / "cache", stride=8)
    assert error.value.hint == "load the editor with the dataset's instructions"

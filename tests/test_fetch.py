"""`imagewam fetch` against a Hub on loopback, with huggingface_hub's real client in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Hub, serve

from imagewam_cli.errors import EditorError
from imagewam_cli.fetch import FetchFile, FetchOptions, FetchPlan, fetch
from imagewam_cli.registry import Registry

EDITOR, REPO = "instruct-pix2pix", "timbrooks/instruct-pix2pix"
LARGE = 22_000_000
"""More than huggingface_hub writes at a time (10 MB), so that a cut leaves something to go on from."""


def repository() -> dict[str, bytes]:
    files = {"model_index.json": b"{}", "README.md": b"words", "safety_checker/model.safetensors": b"not read"}
    for part in ("unet", "vae", "text_encoder"):
        files[f"{part}/config.json"] = b"{}"
        files[f"{part}/model.safetensors"] = part.encode() * 10
        files[f"{part}/model.fp16.safetensors"] = b"the same again"
        files[f"{part}/model.bin"] = b"a pickle"
    return files | {"tokenizer/vocab.json": b"{}", "scheduler/scheduler_config.json": b"{}"}


WANTED = {
    "model_index.json",
    *(f"{part}/{file}" for part in ("unet", "vae", "text_encoder") for file in ("config.json", "model.safetensors")),
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
}


def run(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "imagewam_cli", *arguments],
        env=os.environ | known | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def on_disk(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_it_takes_what_the_plugin_reads_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    files = repository() | {"unet/model.safetensors": os.urandom(LARGE)}
    with serve(Hub(REPO, files, cut={"unet/model.safetensors": LARGE - 1000})) as hub:
        done = run(hub, tmp_path, "--quiet", "fetch", EDITOR, "--max-workers", "1")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert on_disk(folder) == WANTED
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)
    asked = [line for line in hub.log if line.startswith("GET") and "unet/model.safetensors" in line]
    assert len(asked) == 2
    assert "bytes=" in asked[1], "the second request continues the first"


def test_a_connection_that_stays_cut_is_one_line_and_keeps_what_is_complete(tmp_path: Path) -> None:
    class Always(dict[str, int]):
        def pop(self, key: str, default: int | None = None) -> int | None:  # type: ignore[override]
            return self.get(key, default)

    with serve(Hub(REPO, repository(), cut=Always({"unet/model.safetensors": 5}))) as hub:
        done = run(hub, tmp_path, "--quiet", "fetch", EDITOR, "--max-workers", "1")
    assert done.returncode == 1
    problem, advice = done.stderr.strip().splitlines()[-2:]
    assert problem.startswith(f"error: fetching {REPO} failed: ")
    assert "complete files are kept" in advice


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    with serve(Hub(REPO, repository())) as hub:
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
        hub.log.clear()
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
    assert not [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]


def test_a_dry_run_says_all_and_fetches_nothing(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files)) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR, "--dry-run", "--format", "json")
    plan = json.loads(done.stdout)
    assert (plan["repo"], plan["revision"]) == (REPO, COMMIT)
    assert {f["name"]: f["bytes"] for f in plan["files"]} == {name: len(files[name]) for name in WANTED}
    assert not any(f["present"] for f in plan["files"])
    assert not [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]


def test_patterns_choose_otherwise(tmp_path: Path) -> None:
    choice = ("--include", "vae/*", "--exclude", "*.bin", "--local-dir", str(tmp_path / "here"))
    with serve(Hub(REPO, repository())) as hub:
        done = run(hub, tmp_path, "--quiet", "fetch", EDITOR, *choice)
    assert done.returncode == 0, done.stderr
    found = {name for name in on_disk(tmp_path / "here") if not name.startswith(".cache")}
    assert found == {"vae/config.json", "vae/model.safetensors", "vae/model.fp16.safetensors"}


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (403, "GatedRepo", "is gated", "accept its terms at"),
        (404, "RepoNotFound", "is not there, or is private", "hf auth login"),
        (401, "", "does not accept the token", "hf auth login"),
        (404, "RevisionNotFound", "has no such revision", "branches and tags"),
        (500, "", "the Hub answered 500", "run the same command again"),
    ],
)
def test_an_answer_that_is_no_is_one_line_with_the_next_step(
    tmp_path: Path, status: int, code: str, message: str, hint: str
) -> None:
    with serve(Hub(REPO, {}, answer=(status, code))) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    problem, advice = done.stderr.strip().splitlines()[-2:]
    assert problem.startswith("error: ")
    assert message in problem
    assert hint in advice


def test_weights_that_are_pickles_alone_are_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/model.")}
    with serve(Hub(REPO, files | {"unet/model.bin": b"a pickle"})) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    assert "weights of unet/ as a pickle alone (unet/model.bin)" in done.stderr


def test_a_repository_of_another_family_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/")}
    with serve(Hub(REPO, files)) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert f"{REPO} has no unet/: it is not a StableDiffusionInstructPix2PixPipeline repository" in done.stderr


def test_offline_and_no_connection_are_one_line(tmp_path: Path) -> None:
    nowhere = Hub(REPO, {}, url="http://127.0.0.1:9")
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):
        done = run(nowhere, tmp_path, "fetch", EDITOR, **environment)
        assert done.returncode == 1
        assert f"error: {REPO} cannot be reached" in done.stderr


def test_the_embedded_editor_needs_no_fetch(tmp_path: Path) -> None:
    done = run(Hub(REPO, {}), tmp_path, "fetch", "tiny")
    assert done.returncode == 2
    assert "the weights of 'tiny' come with its plugin" in done.stderr


def test_a_disk_without_room_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = FetchPlan(
        editor=EDITOR, repo=REPO, revision=COMMIT, files=(FetchFile(name="a", bytes=3_000_000_000, present=False),)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(EditorError, match=r"needs 3\.0 GB more, and .* has 2\.0 GB free"):
        fetch(Registry.installed().editors.get(EDITOR), FetchOptions(local_dir=tmp_path / "new"), plan)


def test_cache_says_which_fetch_to_run(tmp_path: Path, tabletop: Path) -> None:
    arguments = ("cache", "--editor", EDITOR, "--dataset", str(tabletop), "--out", str(tmp_path / "c"))
    done = run(Hub(REPO, {}), tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert f"run `imagewam fetch {EDITOR}`" in done.stderr

"""Run `imagewam fetch` against a Hub on loopback, with huggingface_hub's real client in another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import AutoencoderKL

from imagewam_cli.editors.loading.hub import FetchFile, FetchPlan, fetch
from imagewam_cli.editors.loading.hub_files import is_loaded_file
from imagewam_cli.editors.loading.hub_options import FetchOptions
from imagewam_cli.errors import EditorError
from imagewam_cli.registry import Registry
from tests.support.hub_server import COMMIT, LATER, Hub, serve

EDITOR, REPO = "instruct-pix2pix", "timbrooks/instruct-pix2pix"
LARGE = 22_000_000
"""Bytes of a large file: more than huggingface_hub writes at once (10 MB), so that a cut leaves a partial file."""


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


def run_python(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code offline with the same Hub cache; `entry` is the editor's entry."""
    before = f"from imagewam_cli.registry import Registry; entry = Registry.installed().editors.get({EDITOR!r})\n"
    known = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", before + code], env=os.environ | known, capture_output=True, text=True)


def loaded(home: Path) -> str:
    """Return the commit that the editor loads, or the error and its hint on two lines."""
    code = (
        "from imagewam_cli.errors import EditorError\n"
        "from imagewam_cli.editors.loading.hub_cache import find_snapshot\n"
        "try: print(find_snapshot(entry).name)\n"
        "except EditorError as error: print(error.message, error.hint, sep=chr(10))"
    )
    done = run_python(home, code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def everything(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Map every path below `folder` to its link target (or "") and its bytes."""
    return {
        str(p.relative_to(folder)): (
            os.readlink(p) if p.is_symlink() else "",
            p.read_bytes() if p.is_file() else b"",
        )
        for p in folder.rglob("*")
    }


def grown(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a later revision of the same repository."""
    return files | {"unet/model.safetensors": b"trained further"}


class EveryTime(dict[str, int]):
    """Cuts that also happen at every later request."""

    def pop(self, key: str, default: int | None = None) -> int | None:  # type: ignore[override]
        return self.get(key, default)


def on_disk(folder: Path) -> set[str]:
    """Return the relative paths of all files below `folder`."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_fetch_takes_the_files_of_the_plugin_and_resumes_after_a_cut(tmp_path: Path) -> None:
    files = repository() | {"unet/model.safetensors": os.urandom(LARGE)}
    with serve(Hub(REPO, files, cut={"unet/model.safetensors": LARGE - 1000})) as hub:
        done = run(hub, tmp_path, "--quiet", "fetch", EDITOR, "--max-workers", "1")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert on_disk(folder) == WANTED
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)
    requests = [line for line in hub.log if line.startswith("GET") and "unet/model.safetensors" in line]
    assert len(requests) == 2
    assert "bytes=" in requests[1], "the second request continues the first"


def test_complete_files_are_not_fetched_again(tmp_path: Path) -> None:
    with serve(Hub(REPO, repository())) as hub:
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
        hub.log.clear()
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
    assert not [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]


def test_a_dry_run_lists_the_files_and_fetches_none(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files)) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR, "--dry-run", "--format", "json")
    plan = json.loads(done.stdout)
    assert (plan["repo"], plan["revision"]) == (REPO, COMMIT)
    assert {f["name"]: f["bytes"] for f in plan["files"]} == {name: len(files[name]) for name in WANTED}
    assert not any(f["present"] for f in plan["files"])
    assert not [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    files, here = repository(), tmp_path / "here"
    with serve(Hub(REPO, files, later=grown(files))) as hub:
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
        hub.main = [LATER]
        before = everything(tmp_path)
        for options in ((), ("--revision", "v1"), ("--local-dir", str(here))):
            done = run(hub, tmp_path, "fetch", EDITOR, "--dry-run", *options)
            assert done.returncode == 0, done.stderr
    assert everything(tmp_path) == before
    assert loaded(tmp_path) == COMMIT


def test_fetch_takes_the_planned_revision_even_if_the_branch_moves(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files, later=grown(files), main=[COMMIT, LATER])) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR, "--format", "json")
    result = json.loads(done.stdout)
    folder = Path(result["folder"])
    assert result["revision"] == folder.name == loaded(tmp_path) == COMMIT
    assert (folder / "unet/model.safetensors").read_bytes() == files["unet/model.safetensors"]


def test_a_newer_revision_is_loaded_once_it_is_complete(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files, later=grown(files))) as hub:
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
        hub.main = [LATER]
        assert run(hub, tmp_path, "fetch", EDITOR, "--include", "vae/*").returncode == 0
        assert loaded(tmp_path) == COMMIT, "chosen files are not the editor"
        assert run(hub, tmp_path, "fetch", EDITOR).returncode == 0
    assert loaded(tmp_path) == LATER


def test_an_incomplete_default_branch_is_refused_and_a_complete_revision_named(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files, later=grown(files))) as hub:
        fetched = run(hub, tmp_path, "--quiet", "fetch", EDITOR)
        hub.main = [LATER]
        other = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, allow_patterns=['vae/*'])"
        subprocess.run(
            [sys.executable, "-c", other],
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"},
            check=True,
            capture_output=True,
        )
    problem, hint = loaded(tmp_path).splitlines()
    assert problem == f"the weights of '{EDITOR}' are incomplete on this machine (revision {LATER})"
    assert f"run `imagewam fetch {EDITOR}`" in hint
    assert hint.endswith(f"--weights {fetched.stdout.strip()}")


def test_another_revision_is_passed_as_weights(tmp_path: Path) -> None:
    files = repository()
    with serve(Hub(REPO, files, later=grown(files), main=[LATER])) as hub:
        older = run(hub, tmp_path, "fetch", EDITOR, "--revision", "v1")
        folder = older.stdout.strip()
        assert Path(folder).name == COMMIT
        assert f"--weights {folder}" in older.stderr
        assert loaded(tmp_path).endswith(f"--weights {folder}")
        newer = run(hub, tmp_path, "fetch", EDITOR)
    assert "--weights" not in newer.stderr
    assert loaded(tmp_path) == LATER


def test_patterns_choose_other_files(tmp_path: Path) -> None:
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
        (404, "RepoNotFound", "does not exist or is private", "hf auth login"),
        (401, "", "does not accept the token", "hf auth login"),
        (404, "RevisionNotFound", "has no such revision", "branches and tags"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_with_the_next_step(
    tmp_path: Path, status: int, code: str, message: str, hint: str
) -> None:
    with serve(Hub(REPO, {}, answer=(status, code))) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    problem, advice = done.stderr.strip().splitlines()[-2:]
    assert problem.startswith("error: ")
    assert message in problem
    assert hint in advice


SHARDED = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)
"""Files of plain weights that `save_pretrained` splits into shards."""
COPIES = (
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
    "model-00001-of-00002.fp16.safetensors",
    "model.safetensors.fp16.index.json",
    "model.int8.safetensors",
    "model.bin.index.fp16.json",
)


def test_plain_shards_are_fetched_and_shards_of_variants_are_not(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/model.")}
    sharded = {f"unet/{name}": b"{}" for name in (*SHARDED, *COPIES)}
    with serve(Hub(REPO, files | sharded)) as hub:
        done = run(hub, tmp_path, "--quiet", "fetch", EDITOR)
    assert done.returncode == 0, done.stderr
    plain = {f"unet/{name}" for name in SHARDED}
    assert on_disk(Path(done.stdout.strip())) == WANTED - {"unet/model.safetensors"} | plain
    assert loaded(tmp_path) == COMMIT, "nothing that is read is missing"


def test_a_repository_with_only_shards_of_variants_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/model.")}
    with serve(Hub(REPO, files | {f"unet/{name}": b"{}" for name in COPIES})) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    assert "safetensors of unet/ only as a variant (unet/model" in done.stderr


def test_is_read_recognises_variants_written_by_diffusers(tmp_path: Path) -> None:
    """A diffusers model saves itself, as one file and in shards."""
    part = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    for options in ({}, {"max_shard_size": "200KB"}):
        plain, copy = (tmp_path / f"{len(options)}-{name}" for name in ("plain", "copy"))
        part.save_pretrained(plain, **options)
        part.save_pretrained(copy, variant="fp16", **options)
        assert on_disk(plain) == {name for name in on_disk(plain) if is_loaded_file(name)}
        assert {name for name in on_disk(copy) if is_loaded_file(name)} == {"config.json"}
        assert (len(on_disk(plain)) > 2) == bool(options)


def test_a_repository_with_only_pickled_weights_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/model.")}
    with serve(Hub(REPO, files | {"unet/model.bin": b"a pickle"})) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    assert "weights of unet/ only as a pickle (unet/model.bin)" in done.stderr


def test_a_part_without_readable_weights_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/model.")}
    copy = "unet/model.fp16.safetensors"
    for there in ({copy: b"a copy", "unet/model.bin": b"a pickle"}, {copy: b"a copy"}):
        with serve(Hub(REPO, files | there)) as hub:
            done = run(hub, tmp_path, "fetch", EDITOR)
        assert done.returncode == 1
        assert f"safetensors of unet/ only as a variant ({copy})" in done.stderr
    with serve(Hub(REPO, files)) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    assert f"{REPO} has no weights of unet/ as safetensors" in done.stderr
    assert not list(tmp_path.rglob("vocab.json"))


def test_a_repository_of_another_family_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in repository().items() if not name.startswith("unet/")}
    with serve(Hub(REPO, files)) as hub:
        done = run(hub, tmp_path, "fetch", EDITOR)
    assert f"{REPO} has no unet/: it is not a StableDiffusionInstructPix2PixPipeline repository" in done.stderr


def test_being_offline_is_one_line(tmp_path: Path) -> None:
    nowhere = Hub(REPO, {}, url="http://127.0.0.1:9")
    done = run(nowhere, tmp_path, "fetch", EDITOR, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {REPO} cannot be reached: offline mode is on (HF_HUB_OFFLINE)\nhint: unset HF_HUB_OFFLINE\n"
    )
    done = run(nowhere, tmp_path, "fetch", EDITOR)
    assert done.returncode == 1
    assert "error: 127.0.0.1:9 refuses the connection\nhint: check the network" in done.stderr


def test_fetching_the_embedded_editor_is_refused(tmp_path: Path) -> None:
    done = run(Hub(REPO, {}), tmp_path, "fetch", "tiny")
    assert done.returncode == 2
    assert "the weights of 'tiny' come with its plugin" in done.stderr


def test_a_disk_without_space_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = FetchPlan(
        editor=EDITOR, repo=REPO, revision=COMMIT, files=(FetchFile(name="a", bytes=3_000_000_000, present=False),)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(EditorError, match=r"needs 3\.0 GB more, but .* has 2\.0 GB free"):
        fetch(Registry.installed().editors.get(EDITOR), FetchOptions(local_dir=tmp_path / "new"), plan)


def test_cache_without_weights_names_the_fetch_command(tmp_path: Path, tabletop: Path) -> None:
    arguments = ("cache", "--editor", EDITOR, "--dataset", str(tabletop), "--out", str(tmp_path / "c"))
    done = run(Hub(REPO, {}), tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert f"run `imagewam fetch {EDITOR}`" in done.stderr

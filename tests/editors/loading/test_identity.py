"""The identity of an editor's weights covers the bytes of every file that is used, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.loading import checksums
from imagewam_cli.editors.loading.checksums import checksum
from imagewam_cli.editors.loading.identity import LoadedFiles
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import EditorError, ImagewamWarning
from imagewam_cli.kvcache.format.provenance import Provenance, fingerprint_digest
from imagewam_cli.policy.bundle import EditorReference
from imagewam_cli.policy.policy import load_policy_editor
from tests.support.editors.instruct_pix2pix import build

NAME = "instruct-pix2pix"
LORA = {"encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 24)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("identity") / NAME)


@pytest.fixture
def folder(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / NAME))


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remember the checksums of all files that were written before; return the file that holds them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checksums, "_LARGE", 0)
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1.0)
    return tmp_path / "home" / "imagewam" / "checksums.json"


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List of the files whose content is hashed from now on."""
    read: list[Path] = []
    whole = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: (read.append(path), whole(path))[1])
    return read


def files_of(folder: Path) -> LoadedFiles:
    classes = installed_editor(NAME).part_classes()  # type: ignore[attr-defined]
    return LoadedFiles(dict.fromkeys(classes, folder), classes)


def load(folder: Path) -> Any:
    return load_editor(NAME, PrefixOptions(cameras=("top",), image_size=(32, 32)), weights=folder)


def digest_before(folder: Path) -> str:
    """The digest as all versions before computed it: names and SHA-256 of every weights, config and tokenizer file."""
    total = hashlib.sha256()
    parts = installed_editor(NAME).entry.components
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] in parts)
    for path in paths:
        if path.suffix in {".safetensors", ".json", ".txt", ".jinja", ".model"} and ".fp16." not in path.name:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def into_hub_cache(folder: Path, home: Path) -> Path:
    """Move a folder into the layout of the Hub's cache: weights are links to blobs named by their SHA-256."""
    snapshot = home / "snapshots" / ("0" * 39 + "1")
    shutil.copytree(folder, snapshot)
    (home / "blobs").mkdir()
    for path in list(snapshot.rglob("*.safetensors")):
        blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


def parts_of(folder: Path) -> Iterator[Path]:
    for part in installed_editor(NAME).entry.components:
        yield from (path for path in (folder / part).iterdir() if path.name != "generation_config.json")


def test_the_digest_is_that_of_older_versions(folder: Path, tmp_path: Path) -> None:
    expected = digest_before(folder)
    assert files_of(folder).digest() == expected
    assert files_of(into_hub_cache(folder, tmp_path / "hub")).digest() == expected
    assert files_of(folder).former_digest() is None


def test_every_file_of_every_component_counts(folder: Path) -> None:
    expected = files_of(folder).digest()
    names = {path.relative_to(folder).as_posix() for path in parts_of(folder)}
    assert {"unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} < names
    for path in list(parts_of(folder)):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert files_of(folder).digest() != expected, path.name
        path.write_bytes(before)
    assert files_of(folder).digest() == expected


def test_a_changed_blob_of_the_hubs_cache_changes_the_digest(folder: Path, tmp_path: Path) -> None:
    snapshot = into_hub_cache(folder, tmp_path / "hub")
    before = files_of(snapshot).digest()
    blob = (snapshot / "unet/diffusion_pytorch_model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-2] ^= 1
    blob.write_bytes(data)
    assert files_of(snapshot).digest() != before


def test_files_that_are_not_used_do_not_count(folder: Path) -> None:
    expected = files_of(folder).digest()
    save_file(LORA, folder / "pytorch_lora_weights.safetensors")
    save_file(LORA, folder / "unet" / "pytorch_lora_weights.safetensors")
    save_file(LORA, folder / "text_encoder" / "adapter_model.safetensors")
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    shutil.copy(folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/old.safetensors")
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert files_of(folder).digest() == expected
    assert files_of(folder).former_digest() == digest_before(folder) != expected


def test_the_digest_is_of_the_bytes_that_were_loaded(folder: Path) -> None:
    editor = load(folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({n: v + 1 for n, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(EditorError, match="changed while the editor was loaded"):
        editor.fingerprint()


class TestPoliciesMadeBefore:
    def reference(self, editor: Any, **changes: Any) -> EditorReference:
        fingerprint = {k: v for k, v in editor.fingerprint().items() if k != "weights_former"} | changes
        return EditorReference(name=NAME, settings=editor.settings, spec=editor.spec, fingerprint=fingerprint)

    def test_one_whose_folder_has_a_lora_still_loads_with_a_warning(self, folder: Path) -> None:
        save_file(LORA, folder / "unet" / "pytorch_lora_weights.safetensors")
        with pytest.warns(ImagewamWarning, match="is a LoRA"):
            editor = load(folder)
        reference = self.reference(editor, weights=digest_before(folder))
        with pytest.warns(ImagewamWarning, match="counted files that are not used"):
            load_policy_editor(reference, weights=folder)

    def test_other_weights_are_still_refused(self, folder: Path) -> None:
        editor = load(folder)
        with pytest.raises(Exception, match=r"editor weights is .*, but the policy expects 0000"):
            load_policy_editor(self.reference(editor, weights="0" * 64), weights=folder)

    def test_the_former_digest_changes_no_digest_of_a_fingerprint(self, folder: Path) -> None:
        fingerprint = load(folder).fingerprint()
        former = fingerprint | {"weights_former": "0" * 64}
        assert fingerprint_digest(former) == fingerprint_digest(fingerprint)
        assert not Provenance(fingerprint=former).differences(Provenance(fingerprint=fingerprint))
        assert not Provenance(fingerprint=former).counted_unused_weights(Provenance(fingerprint=fingerprint))


class TestChecksums:
    def test_a_large_file_is_read_once(self, tmp_path: Path, everything_is_large: Path, read_files: list[Path]) -> None:
        path = tmp_path / "weights"
        path.write_bytes(b"abc")
        expected = hashlib.sha256(b"abc").hexdigest()
        link = tmp_path / "link"
        link.symlink_to(path)
        assert [checksum(path), checksum(path), checksum(link)] == [expected] * 3
        assert len(read_files) == 1

    def test_another_content_of_the_same_size_is_noticed(self, tmp_path: Path, everything_is_large: Path) -> None:
        path = tmp_path / "weights"
        path.write_bytes(b"abc")
        state = path.stat()
        checksum(path)
        path.write_bytes(b"abd")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as tools do that keep the time of a copy
        assert checksum(path) == hashlib.sha256(b"abd").hexdigest()

    def test_a_file_that_was_just_written_is_not_remembered(
        self, tmp_path: Path, everything_is_large: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checksums, "_SETTLED_SECONDS", 60.0)
        (tmp_path / "weights").write_bytes(b"abc")
        checksum(tmp_path / "weights")
        assert not everything_is_large.exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": [1, 2]}'])
    def test_a_damaged_memory_is_replaced(self, tmp_path: Path, everything_is_large: Path, content: str) -> None:
        everything_is_large.parent.mkdir(parents=True)
        everything_is_large.write_text(content)
        (tmp_path / "weights").write_bytes(b"abc")
        assert checksum(tmp_path / "weights") == hashlib.sha256(b"abc").hexdigest()
        assert [*json.loads(everything_is_large.read_text())] == [str(tmp_path / "weights")]

    def test_files_that_are_gone_are_forgotten(self, tmp_path: Path, everything_is_large: Path) -> None:
        for name in "ab":
            (tmp_path / name).write_bytes(name.encode())
        checksum(tmp_path / "a")
        (tmp_path / "a").unlink()
        checksum(tmp_path / "b")
        assert [*json.loads(everything_is_large.read_text())] == [str(tmp_path / "b")]

    def test_without_a_home_folder_the_file_is_read_again(
        self, tmp_path: Path, everything_is_large: Path, read_files: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as Python does without a home folder
        (tmp_path / "weights").write_bytes(b"abc")
        checksum(tmp_path / "weights")
        checksum(tmp_path / "weights")
        assert len(read_files) == 2

    def test_a_home_that_is_a_file_costs_nothing(self, tmp_path: Path, everything_is_large: Path) -> None:
        (tmp_path / "home").write_text("")
        (tmp_path / "weights").write_bytes(b"abc")
        assert checksum(tmp_path / "weights") == hashlib.sha256(b"abc").hexdigest()

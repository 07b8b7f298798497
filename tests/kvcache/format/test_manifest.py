"""Test `kvcache.format.manifest`: round trip, checksum, digest, and manifests that are refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import CacheError
from imagewam_cli.files import write_atomically
from imagewam_cli.kvcache.format.manifest import (
    MANIFEST,
    DatasetEntry,
    Manifest,
    ShardEntry,
    with_checksum,
)
from imagewam_cli.kvcache.format.provenance import fingerprint_digest
from imagewam_cli.kvcache.storage.manifests import put_manifest, read_manifest, storage_at
from tests.support.arithmetic_editor import ArithmeticEditor
from tests.support.faults import out_of_space


@pytest.fixture
def manifest() -> Manifest:
    editor = ArithmeticEditor()
    dataset = DatasetEntry(
        path="somewhere",
        format="memory",
        identity="0123",
        fps=10.0,
        state_names=("x",),
        action_names=("dx", "dy"),
        episodes=2,
        rows=7,
        stride=2,
        keys=KeyMap(cameras=("top",)),
    )
    shard = ShardEntry(file="shard-00000.safetensors", rows=3, bytes=99, checksum="ab", episodes=(0,), batch=4)
    return Manifest(
        version=2,
        fingerprint=editor.fingerprint(),
        spec=editor.spec,
        codec="fp32",
        dataset=dataset,
        instructions=("push",),
        files={"table.safetensors": "cd"},
        total_rows=4,
        shards=(shard,),
    )


def edit(folder: Path, **values: Any) -> None:
    path = folder / MANIFEST
    path.write_bytes(
        with_checksum({k: v for k, v in (json.loads(path.read_text()) | values).items() if k != "checksum"})
    )


def test_a_manifest_is_read_back_unchanged(tmp_path: Path, manifest: Manifest) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    assert read_manifest(tmp_path) == manifest


def test_the_checksum_is_that_of_the_text_with_the_checksum_zeroed(tmp_path: Path, manifest: Manifest) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    text = (tmp_path / MANIFEST).read_text()
    checksum = json.loads(text)["checksum"]
    assert checksum == xxhash.xxh3_128_hexdigest(text.replace(checksum, 32 * "0").encode())


def test_any_changed_byte_is_found(tmp_path: Path, manifest: Manifest) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for i in range(len(whole)):
        for bit in (0, 5):
            changed = bytearray(whole)
            changed[i] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(CacheError):
                read_manifest(tmp_path)


def test_rows_are_those_of_the_finished_shards(manifest: Manifest) -> None:
    assert (manifest.rows, manifest.complete) == (3, False)
    assert dataclasses.replace(manifest, total_rows=3).complete


@pytest.mark.parametrize("version", [3, 1, 0, "2", None])
def test_another_version_is_refused_with_both_values(tmp_path: Path, manifest: Manifest, version: Any) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    edit(tmp_path, version=version, added_by_a_newer_version=1)
    with pytest.raises(CacheError) as error:
        read_manifest(tmp_path)
    assert f"version {version!r}" in error.value.message
    assert "reads version 2" in error.value.message
    assert error.value.hint == (
        "build the cache again into another folder" if version in (0, 1) else "upgrade imagewam"
    )


@pytest.mark.parametrize(
    "name", ["../shard.safetensors", "/etc/passwd", "deeper/shard.safetensors", "..", ".", "", "a/../../b"]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, manifest: Manifest, name: str) -> None:
    shard = dataclasses.replace(manifest.shards[0], file=name)
    put_manifest(storage_at(tmp_path), dataclasses.replace(manifest, shards=(shard,)))
    with pytest.raises(CacheError, match="not a plain file name") as error:
        read_manifest(tmp_path)
    assert repr(name) in error.value.message


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "deeper/evil", "..", ".", ""])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, manifest: Manifest, name: str) -> None:
    put_manifest(storage_at(tmp_path), dataclasses.replace(manifest, files={**manifest.files, name: "0" * 32}))
    with pytest.raises(CacheError, match="not a plain file name") as error:
        read_manifest(tmp_path)
    assert repr(name) in error.value.message


@pytest.mark.parametrize("text", ["", "{", '{"version": 1', "\x00", "[1]", '"cache"', "null"])
def test_damaged_json_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CacheError, match="is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codec": 7}, "codec must be str"),
        ({"total_rows": None}, "total_rows must be int"),
        ({"dataset": {}}, "dataset"),
        ({"kodec": "float32"}, "unknown key 'kodec'"),
        ({"shards": [{"file": "a"}]}, "is missing"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(
    tmp_path: Path, manifest: Manifest, values: dict[str, Any], message: str
) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    edit(tmp_path, **values)
    with pytest.raises(CacheError, match="is damaged") as error:
        read_manifest(tmp_path)
    assert message in error.value.message


def test_a_folder_without_a_manifest_is_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is not a cache"):
        read_manifest(tmp_path)


def test_equal_fingerprints_have_equal_digests_whatever_their_order() -> None:
    fingerprint = ArithmeticEditor().fingerprint()
    assert fingerprint_digest(fingerprint) == fingerprint_digest(dict(reversed(fingerprint.items())))


def test_the_origin_of_the_weights_does_not_change_the_digest() -> None:
    fingerprint = ArithmeticEditor().fingerprint()
    assert fingerprint_digest(fingerprint | {"revision": "a" * 40}) == fingerprint_digest(fingerprint)


def test_the_digest_survives_a_round_trip_through_json(tmp_path: Path, manifest: Manifest) -> None:
    put_manifest(storage_at(tmp_path), manifest)
    assert read_manifest(tmp_path).digest == fingerprint_digest(ArithmeticEditor().fingerprint())


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "denoise"},
        {"timestep": 0.5},
        {"layers": "0"},
        {"segments": ("reference",)},
        {"text_padding": "keep"},
        {"image_size": (32, 32)},
        {"camera_layout": "separate"},
        {"pool": 2},
        {"rounding": "published-bf16"},
        {"prompt_template": "Do: {instruction}"},
        {"compute_dtype": "bfloat16"},
        {"quantization": "int8"},
        {"cameras": ("top", "wrist")},
        {"blank_images": True},
        {"random_weights": True},
    ],
)
def test_every_setting_changes_the_digest(change: dict[str, Any]) -> None:
    editor = ArithmeticEditor()
    before = fingerprint_digest(editor.fingerprint())
    editor.settings = dataclasses.replace(editor.settings, **change)
    assert fingerprint_digest(editor.fingerprint()) != before


def test_every_setting_has_a_test_case() -> None:
    cases = next(m for m in test_every_setting_changes_the_digest.pytestmark if m.name == "parametrize").args[1]
    assert {key for case in cases for key in case} == {f.name for f in dataclasses.fields(PrefixOptions)}


def test_weights_and_template_change_the_digest() -> None:
    plain, other = ArithmeticEditor(), ArithmeticEditor()
    other.entry = dataclasses.replace(other.entry, prompt_template="Task: {instruction}")
    digests = {fingerprint_digest(e.fingerprint()) for e in (plain, other, ArithmeticEditor(weights="others"))}
    assert len(digests) == 3


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}

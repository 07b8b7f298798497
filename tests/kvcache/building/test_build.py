"""Test `kvcache.building.build`: files, interruptions and refusals. Shards are read with safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.errors import CacheError, DatasetError, UsageError
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings, bytes_per_row, plan_build
from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT16, FLOAT32, CastCodec
from imagewam_cli.kvcache.codecs.pca import PCA1
from imagewam_cli.kvcache.format.manifest import BuildPart, manifest_names
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.local import LocalStorage
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.prefix.kv import PrefixKV
from tests.support.arithmetic_cache import CUT, LENGTHS, SETTINGS, build
from tests.support.arithmetic_editor import INSTRUCTIONS, ArithmeticEditor, MemoryDataset, numbers, seen
from tests.support.faults import out_of_space, stop_after
from tests.support.folders import files


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((folder / "shards").iterdir())]


class Worded(ArithmeticEditor):
    """An editor whose library uses another prompt template."""

    def fingerprint(self) -> dict[str, object]:
        return super().fingerprint() | {"recipe": {"template": "please {}"}}


class TestPlan:
    @pytest.mark.parametrize(("codec", "size"), [(FLOAT32, 4), (BFLOAT16, 2), (FLOAT16, 2)])
    def test_bytes_per_row_equal_a_hand_computation(self, codec: CastCodec, size: int) -> None:
        # 2 layers x (K, V) x 12 tokens x 2 heads x 4 numbers, plus 12 bytes of valid and five index numbers of 8 bytes
        assert bytes_per_row(ArithmeticEditor().spec, codec) == 2 * 2 * 12 * 2 * 4 * size + 12 + 48

    @pytest.mark.parametrize("codec", [FLOAT32, BFLOAT16, FLOAT16])
    def test_a_shard_holds_the_planned_bytes_beside_its_header(
        self, tmp_path: Path, dataset: MemoryDataset, codec: CastCodec
    ) -> None:
        build(tmp_path / "cache", codec=codec)
        plan = plan_build(dataset, ArithmeticEditor().spec, codec, SETTINGS)
        written = 0
        for path in (tmp_path / "cache" / "shards").iterdir():
            header = int.from_bytes(path.read_bytes()[:8], "little")
            written += path.stat().st_size - 8 - header
        assert written == plan.total_bytes

    def test_shards_are_whole_episodes_up_to_the_size(self, dataset: MemoryDataset) -> None:
        plan = plan_build(dataset, ArithmeticEditor().spec, FLOAT32, SETTINGS)
        assert tuple(tuple(e.index for e in shard) for shard in plan.shards) == CUT
        assert plan.rows == 3 + 5 + 2 + 1 + 4

    def test_an_episode_larger_than_a_shard_gets_its_own_shard(self, dataset: MemoryDataset) -> None:
        plan = plan_build(dataset, ArithmeticEditor().spec, FLOAT32, BuildSettings(shard_mb=1e-6))
        assert [len(shard) for shard in plan.shards] == [1] * 5

    def test_half_the_bytes_per_number_give_twice_the_rows_per_shard(self, dataset: MemoryDataset) -> None:
        plan = plan_build(dataset, ArithmeticEditor().spec, BFLOAT16, SETTINGS)
        # A row takes 836 bytes, so 9000 bytes hold ten rows.
        assert [sum(-(-e.length // 2) for e in shard) for shard in plan.shards] == [3 + 5 + 2, 1 + 4]

    @pytest.mark.parametrize("settings", [{"stride": 0}, {"batch": 0}, {"shard_mb": 0.0}, {"shard_mb": -1.0}])
    def test_invalid_settings_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            BuildSettings(**settings)


class TestContent:
    def test_every_strided_row_is_stored_once_in_order(self, built: Path) -> None:
        found = {key: torch.cat([s[key] for s in shards(built)]).tolist() for key in ("row", "episode", "frame")}
        starts = np.cumsum([0, *LENGTHS])
        expected = [(int(starts[e]) + f, e, f) for e, length in enumerate(LENGTHS) for f in range(0, length, 2)]
        assert list(zip(found["row"], found["episode"], found["frame"], strict=True)) == expected

    def test_each_shard_holds_the_episodes_listed_in_the_manifest(self, built: Path) -> None:
        manifest = read_manifest(built)
        assert tuple(entry.episodes for entry in manifest.shards) == CUT
        for entry, tensors in zip(manifest.shards, shards(built), strict=True):
            assert tuple(tensors["episode"].unique().tolist()) == entry.episodes
            assert len(tensors["row"]) == entry.rows

    def test_instructions_are_those_of_the_rows(self, built: Path) -> None:
        manifest = read_manifest(built)
        assert manifest.instructions == INSTRUCTIONS
        for tensors in shards(built):
            for episode, number in zip(tensors["episode"].tolist(), tensors["instruction"].tolist(), strict=True):
                assert manifest.instructions[number] == INSTRUCTIONS[episode % len(INSTRUCTIONS)]

    def test_keys_and_values_are_what_the_editor_computes_for_the_row(
        self, built: Path, dataset: MemoryDataset
    ) -> None:
        rows = {row.row: row for row in dataset.rows()}
        for tensors in shards(built):
            for i, number in enumerate(tensors["row"].tolist()):
                row = rows[number]
                for layer in (0, 1):
                    k, v = numbers(row.images["top"], row.instruction, layer)
                    np.testing.assert_array_equal(tensors[f"layer.{layer}.k"][i].numpy(), k)
                    np.testing.assert_array_equal(tensors[f"layer.{layer}.v"][i].numpy(), v)
                np.testing.assert_array_equal(tensors["valid"][i].numpy(), seen(row.instruction))

    def test_the_table_holds_every_frame_for_any_stride(self, built: Path, dataset: MemoryDataset) -> None:
        table = load_file(built / "table.safetensors")
        rows = list(dataset.rows())
        np.testing.assert_array_equal(table["state"].numpy(), np.stack([r.state for r in rows]))
        np.testing.assert_array_equal(table["action"].numpy(), np.stack([r.action for r in rows]))
        assert table["length"].tolist() == list(LENGTHS)

    def test_samples_are_rows_of_the_dataset_with_their_images(self, built: Path, dataset: MemoryDataset) -> None:
        samples = Samples.load(built / SAMPLES).observations
        assert samples
        states = [row.state.tobytes() for row in dataset.rows()]
        rows = list(dataset.rows())
        for sample in samples:
            row = rows[states.index(sample.state.tobytes())]
            np.testing.assert_array_equal(sample.images["top"], row.images["top"])
            assert sample.instruction == row.instruction

    def test_lost_samples_are_written_again(self, built: Path, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        shutil.copytree(built, folder)
        (folder / SAMPLES).unlink()
        build(folder)
        assert (folder / SAMPLES).read_bytes() == (built / SAMPLES).read_bytes()

    def test_damaged_samples_are_a_clear_error(self, built: Path, tmp_path: Path) -> None:
        path = tmp_path / SAMPLES
        path.write_bytes((built / SAMPLES).read_bytes()[:-10])
        with pytest.raises(DatasetError, match="missing or damaged"):
            Samples.load(path)

    def test_progress_counts_every_row(self, tmp_path: Path) -> None:
        counted: list[int] = []
        build(tmp_path / "cache", on_rows=counted.append)
        assert sum(counted) == 15

    def test_all_shards_are_built_from_one_stream_of_images(self, tmp_path: Path, dataset: MemoryDataset) -> None:
        build(tmp_path / "cache", dataset=dataset)
        samples, rest = dataset.streams
        assert samples == rest == tuple(range(len(LENGTHS)))
        (tmp_path / "cache" / "shards" / "shard-00001.safetensors").unlink()
        (tmp_path / "cache" / "shards" / "shard-00003.safetensors").unlink()
        build(tmp_path / "cache", dataset=dataset)
        assert dataset.streams[2:] == [CUT[1] + CUT[3]]

    @pytest.mark.parametrize("bad", [1, 4])
    def test_an_episode_that_ends_wrongly_stops_the_build_before_its_shard(self, tmp_path: Path, bad: int) -> None:
        """An error that a dataset raises after an episode's last row must not be lost between two shards."""

        class Longer(MemoryDataset):
            def _stream(self, episodes: Any, stride: int, images: bool) -> Any:
                for row in super()._stream(episodes, stride, images):
                    yield row
                    # The samples are read in a separate stream of all episodes.
                    if images and episodes is not None and row.episode == bad and row.frame + stride >= LENGTHS[bad]:
                        raise DatasetError("the video goes on")

        for _ in range(2):
            with pytest.raises(DatasetError, match="the video goes on"):
                build(tmp_path / "cache", dataset=Longer(LENGTHS))
            written = [entry.episodes for entry in read_manifest(tmp_path / "cache").shards]
            assert all(bad not in episodes for episodes in written)

    def test_fewer_rows_than_the_metadata_says_are_refused(self, tmp_path: Path) -> None:
        class Shorter(MemoryDataset):
            def _stream(self, episodes: Any, stride: int, images: bool) -> Any:
                for row in super()._stream(episodes, stride, images):
                    if not images or (row.episode, row.frame) != (2, 2):
                        yield row

        message = r"shard-00002\.safetensors should have 3 rows according to the dataset's metadata, but got 2"
        with pytest.raises(CacheError, match=message):
            build(tmp_path / "cache", dataset=Shorter(LENGTHS))

    def test_the_batch_size_does_not_change_the_bytes(self, built: Path, tmp_path: Path) -> None:
        build(tmp_path / "cache", batch=1)
        for one, three in zip(shards(tmp_path / "cache"), shards(built), strict=True):
            assert all(torch.equal(one[name], three[name]) for name in three)

    def test_stored_rows_equal_a_real_editors_prefix_of_the_single_row(
        self, tiny_cache: Path, tabletop: Path, load_tiny: Any
    ) -> None:
        dataset = open_dataset(tabletop)
        editor = load_tiny(instructions_of(dataset))
        reader = CacheReader(tiny_cache)
        rows = list(dataset.rows(stride=4))
        for i in (0, len(rows) // 2, len(rows) - 1):
            alone = editor.encode([rows[i].images], [rows[i].instruction])
            stored = reader.read(np.array([i]))
            assert torch.equal(stored.valid, alone.valid)
            for found, expected in zip(stored.layers, alone.layers, strict=True):
                torch.testing.assert_close(found.k, expected.k, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found.v, expected.v, rtol=1e-5, atol=1e-5)


class TestContinuation:
    @pytest.mark.parametrize("rows", [1, 3, 7, 8, 11, 14])
    def test_an_interrupted_build_ends_with_the_same_bytes(self, built: Path, tmp_path: Path, rows: int) -> None:
        out = tmp_path / "cache"
        with pytest.raises(KeyboardInterrupt):
            build(out, on_rows=stop_after(rows))
        assert not read_manifest(out).complete
        build(out)
        assert files(out) == files(built)

    def test_an_interrupted_build_keeps_its_finished_shards(self, tmp_path: Path) -> None:
        out = tmp_path / "cache"
        with pytest.raises(KeyboardInterrupt):
            build(out, on_rows=stop_after(9))
        assert read_manifest(out).rows == 3 + 5
        assert build(out).encoded == 2 + 1 + 4

    def test_a_finished_cache_is_not_changed(self, built: Path, tmp_path: Path) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        counted: list[int] = []
        assert build(out, on_rows=counted.append).encoded == 0
        assert sum(counted) == 15
        assert files(out) == files(built)

    @pytest.mark.parametrize("broken", [(0,), (1,), (3,), (0, 2), (0, 1, 2, 3)])
    @pytest.mark.parametrize("how", ["deleted", "truncated"])
    def test_a_broken_shard_is_built_again(
        self, built: Path, tmp_path: Path, broken: tuple[int, ...], how: str
    ) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        for number in broken:
            path = out / "shards" / f"shard-{number:05d}.safetensors"
            path.unlink() if how == "deleted" else os.truncate(path, 100)
        assert build(out).encoded == sum((3, 5, 3, 4)[number] for number in broken)
        assert files(out) == files(built)

    def test_intact_shards_stay_in_the_manifest_while_a_broken_one_is_built(self, built: Path, tmp_path: Path) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        for number in (0, 2):
            (out / "shards" / f"shard-{number:05d}.safetensors").unlink()
        with pytest.raises(KeyboardInterrupt):
            build(out, on_rows=stop_after(5 + 4 + 3 + 1))
        assert [entry.episodes for entry in read_manifest(out).shards] == [(0,), (1,), (4,)]

    @pytest.mark.parametrize("how", ["deleted", "truncated"])
    def test_a_broken_table_is_written_again(self, built: Path, tmp_path: Path, how: str) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        path = out / "table.safetensors"
        path.unlink() if how == "deleted" else os.truncate(path, 100)
        assert build(out).encoded == 0
        assert files(out) == files(built)

    @pytest.mark.parametrize("stopped_at", range(1, 11))
    def test_a_build_stopped_while_it_starts_resumes(
        self, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
    ) -> None:
        """Stop at the first, second or third flush and leave a half-written file, as a power cut does."""
        out, real, calls = tmp_path / "cache", os.fsync, 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stopped_at:
                raise KeyboardInterrupt
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            with pytest.raises(KeyboardInterrupt):
                build(out)
        build(out)
        assert files(out) == files(built)

    @pytest.mark.parametrize("part", [None, BuildPart(index=1, count=2)])
    def test_a_build_reads_each_manifest_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: BuildPart | None
    ) -> None:
        """Reading a remote manifest costs a network round trip. A fitted codec also writes its file."""
        out, real, read = tmp_path / "cache", LocalStorage.read, list[str]()
        parts = [None] if part is None else [BuildPart(index=0, count=2), part]
        for each in parts:
            with pytest.raises(KeyboardInterrupt):
                build(out, codec=PCA1, part=each, shard_mb=1e-6, on_rows=stop_after(1))

        def counted(storage: LocalStorage, name: str) -> bytes:
            read.append(name)
            return real(storage, name)

        monkeypatch.setattr(LocalStorage, "read", counted)
        build(out, codec=PCA1, part=part, shard_mb=1e-6)
        names = manifest_names([path.name for path in out.iterdir()])
        assert len(names) == len(parts)
        assert [name for name in read if name.startswith("manifest.")] == names

    def test_too_little_space_is_reported_before_anything_is_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))
        editor = ArithmeticEditor()
        with pytest.raises(CacheError, match=r"needs 0\.0 GB more, .+ has 0\.0 GB free"):
            build(tmp_path / "cache", editor=editor)
        assert editor.encoded == 0

    def test_a_build_resumes_after_a_full_disk(
        self, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "cache"

        def fill(rows: int) -> None:
            if read_manifest(out).rows >= 3 + 5:
                monkeypatch.setattr(os, "fsync", out_of_space)

        with pytest.raises(OSError, match="No space left"):
            build(out, on_rows=fill)
        monkeypatch.undo()
        assert not [name for name in files(out) if name.endswith(".partial")]
        assert read_manifest(out).rows >= 3 + 5
        build(out)
        assert files(out) == files(built)


class TestRefusal:
    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"dataset": MemoryDataset(LENGTHS, identity="another")}, ("its dataset:",)),
            ({"dataset": MemoryDataset(LENGTHS, shift=1.0)}, ("its states or actions:",)),
            ({"stride": 3}, ("its stride:", ": 2,", "has 3")),
            ({"codec": BFLOAT16}, ("its codec:", ": fp32,", "has bf16")),
            ({"editor": ArithmeticEditor(weights="trained longer")}, ("its editor weights:",)),
            ({"editor": Worded()}, ("its editor recipe:", ": None,", "has {'template': 'please {}'}")),
            ({"editor": ArithmeticEditor(timestep=0.5)}, ("its setting 'timestep':", ": 0.0,", "has 0.5")),
            ({"shard_mb": 1.0}, ("different shards", "episodes 0 to 0", "episodes 0 to 4")),
            ({"shard_mb": 0.001}, ("different shards", "episodes 2 to 3", "episodes 2 to 2")),
        ],
    )
    def test_another_build_into_the_same_folder_is_refused_with_both_values(
        self, built: Path, tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
    ) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        with pytest.raises(CacheError) as error:
            build(out, **change)
        assert all(part in error.value.message for part in parts), error.value.message
        assert error.value.hint is not None
        assert "--out" in error.value.hint
        assert files(out) == files(built)

    def test_checksums_that_differ_are_named(self, built: Path, tmp_path: Path) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        other = ArithmeticEditor(weights="trained longer")
        with pytest.raises(CacheError) as error:
            build(out, editor=other)
        for editor in (ArithmeticEditor(), other):
            assert editor.weights.sha256[:16] in error.value.message

    def test_a_folder_with_something_else_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a cache"):
            build(tmp_path)
        assert files(tmp_path) == {"notes.txt": b"mine"}

    def test_an_empty_folder_is_accepted(self, built: Path, tmp_path: Path) -> None:
        build(tmp_path)
        assert files(tmp_path) == files(built)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda p: spoiled(p, 1, v=p.layers[1].v.index_fill(1, torch.tensor([3]), float("nan"))), "not finite"),
            (lambda p: spoiled(p, 0, k=p.layers[0].k * float("inf")), "not finite"),
            (lambda p: spoiled(p, 0, k=p.layers[0].k[:, :-1]), "(3, 11, 2, 4), but its spec declares (3, 12, 2, 4)"),
            (lambda p: spoiled(p, 1, v=p.layers[1].v[:, :, :1]), "(3, 12, 1, 4), but its spec declares (3, 12, 2, 4)"),
            (lambda p: spoiled(p, 0, k=p.layers[0].k[:-1], v=p.layers[0].v[:-1]), "(2, 12, 2, 4)"),
            (lambda p: PrefixKV(p.layers[:1], p.valid), "1 layers, but its spec declares 2"),
            (lambda p: PrefixKV(p.layers, p.valid[:, :-1]), "`valid` of shape (3, 11)"),
        ],
    )
    def test_a_prefix_that_does_not_match_the_layout_is_refused(
        self, tmp_path: Path, spoil: Callable[[PrefixKV], PrefixKV], message: str
    ) -> None:
        out = tmp_path / "cache"
        with pytest.raises(CacheError) as error:
            build(out, editor=ArithmeticEditor(spoil=spoil))
        assert message in error.value.message
        assert read_manifest(out).rows == 0
        assert not list((out / "shards").iterdir())

    def test_numbers_that_overflow_the_dtype_stop_the_build(self, tmp_path: Path) -> None:
        loud = ArithmeticEditor(spoil=lambda p: spoiled(p, 1, k=p.layers[1].k * 1e5))
        with pytest.raises(CacheError, match=r"layer layer 1: numbers up to .+ do not fit fp16"):
            build(tmp_path / "cache", editor=loud, codec=FLOAT16)

    def test_a_newer_cache_is_not_resumed(self, built: Path, tmp_path: Path) -> None:
        out = shutil.copytree(built, tmp_path / "cache")
        manifest = out / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
        before = files(out)
        with pytest.raises(CacheError, match="version 3"):
            build(out)
        assert files(out) == before


def spoiled(prefix: PrefixKV, layer: int, **parts: torch.Tensor) -> PrefixKV:
    layers = list(prefix.layers)
    layers[layer] = dataclasses.replace(layers[layer], **parts)
    return PrefixKV(tuple(layers), prefix.valid)

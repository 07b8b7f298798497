"""Run the benchmarks at tiny sizes, and check what they measure."""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.registry import Registry
from tests.support.paths import EXAMPLES

BENCHMARKS = EXAMPLES / "benchmarks"


@pytest.fixture(autouse=True)
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts import modules from their own folder, as Python does when it runs them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def output_of(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    path = BENCHMARKS / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    text: str = capsys.readouterr().out
    return text


def test_rounds_are_interleaved_and_the_first_is_discarded() -> None:
    interleaved = runpy.run_path(str(BENCHMARKS / "timing.py"))["interleaved"]
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("capture_overhead", ["bare", "recorded", "recorded, stopped early"]),
        ("prefill", ["padded", "padded, stopped early", "trimmed", "trimmed, stopped early"]),
    ],
)
def test_times_are_printed(script: str, names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ("--small", "--repetitions", "1")
    tables = output_of(script, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert all(f"| {name} | " in tables for name in names)
    result = json.loads(output_of(script, *options, "--json", monkeypatch=monkeypatch, capsys=capsys))
    for seconds in result["seconds"].values():
        assert list(seconds)[: len(names)] == names
        assert all(s > 0 for s in seconds.values())


def test_the_expert_of_the_prefill_benchmark_steps_as_a_policy_does() -> None:
    prefill = runpy.run_path(str(BENCHMARKS / "prefill.py"))
    model = prefill["transformer"](prefill["SMALL"], torch.device("cpu"), torch.float32)
    act = prefill["Acting"](model, prefill["inputs"](model, prefill["VALID"]), prefill["expert"](model, 32, 4))
    prefix = act.prefill()
    assert [tuple(kv.k.shape) for kv in prefix.layers] == [(1, 25 + 14 * 28, 2, 64)] * 2
    with torch.no_grad():
        expected = integrate(act.expert, act.noise, act.state, prefix, FlowSchedule(shift=2.0), prefill["STEPS"])
    torch.testing.assert_close(act.whole(), expected)


def test_measured_row_bytes_equal_those_of_the_layout(tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "real_dimensions.py"))
    name = "instruct-pix2pix"
    script["PIPELINES"][name](Registry.installed().editors.get(name), tmp_path / name, True)
    settings = PrefixOptions(image_size=script["SMALL_SIZES"][name], cameras=("top",), compute_dtype="float32")
    found = script["measure"](name, tmp_path / name, settings, rows=3, batch=2, codecs=())
    assert found["row_bytes"] == found["declared_bytes"] > 0
    assert found["peak_bytes"] > found["weight_bytes"] > 0


def test_each_codec_is_measured_in_a_separate_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ("--editor", "flux2-klein-4b", "--out", str(tmp_path), "--rows", "3", "--batch", "2", "--small")
    options = (*options, "--codecs", "int4", "pca1")
    text = output_of("real_dimensions", *options, monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith("flux2-klein-4b, bfloat16, ")
    assert "3 rows in " in text
    assert "as its layout declares" in text
    errors = {line.partition(":")[0]: line for line in text.splitlines() if "attention error" in line}
    assert list(errors) == ["int4", "pca1"]


def test_row_bytes_that_differ_from_the_layout_are_an_error() -> None:
    report = runpy.run_path(str(BENCHMARKS / "real_dimensions.py"))["report"]
    with pytest.raises(SystemExit, match="a row has 10 bytes, but its layout declares 12"):
        report({"row_bytes": 10, "declared_bytes": 12})


@pytest.mark.parametrize("name", ["instruct-pix2pix", "flux2-klein-4b"])
def test_random_pipelines_have_the_released_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(BENCHMARKS / "real_dimensions.py"))
    built: dict[str, int] = {}

    def count(kind: Any, config: Any, dtype: torch.dtype) -> str:
        with torch.device("meta"):
            built[kind.__name__] = sum(p.numel() for p in kind.from_config(config).parameters())
        return kind.__name__

    pipeline = script["PIPELINES"][name]
    monkeypatch.setitem(pipeline.__globals__, "random_model", count)
    monkeypatch.setitem(pipeline.__globals__, "save", lambda *_: None)
    entry = Registry.installed().editors.get(name)
    pipeline(entry, tmp_path, False)
    assert sorted(built.values()) == sorted([entry.components["vae"].parameters, entry.parameters])


def test_training_with_and_without_a_cache_is_timed(
    tabletop: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--size", "64", "--codec", "fp32"]
    options += ["--stride", "40", "--batch", "4", "--precision", "float32"]
    run = {"monkeypatch": monkeypatch, "capsys": capsys}
    tables = output_of("online_or_cache", *options, "--draws", "2", "--steps", "2", **run)
    assert "| draws | cache, rows/s | online, rows/s | cache pays off after |" in tables
    assert "| steps | cache, 2 draws | online, 2 draws |" in tables
    options += ["--draws", "1", "3", "--steps", "3", "--json"]
    result = json.loads(output_of("online_or_cache", *options, **run))
    assert [(r["prefixes"], r["draws"]) for r in result["runs"]] == [
        *(("cache", 1), ("online", 1), ("cache", 3), ("online", 3))
    ]
    losses = [[point["loss"] for point in r["points"]] for r in result["runs"]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # equal rows and noise make the times comparable
    assert losses[2] == pytest.approx(losses[3], abs=1e-5)
    assert losses[0] != pytest.approx(losses[2], abs=1e-5)
    for r in result["runs"]:
        assert [point["step"] for point in r["points"]] == [1, 2, 3]
        assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(r["points"]))
        assert r["rows_per_second"] > 0


def test_a_cache_pays_off_once_it_has_saved_its_build_time() -> None:
    script = runpy.run_path(str(BENCHMARKS / "online_or_cache.py"))
    build = script["Build"](rows=100, seconds=30.0)
    # A pass of 100 rows takes 10 s from the cache and 25 s online, so each pass saves 15 s.
    assert script["won_back"](build, 10.0, 4.0) == pytest.approx(2.0)
    assert script["won_back"](build, 4.0, 4.0) is None


SMALL_TINY = ["--size", "64", "--batch", "4"]


@pytest.fixture
def recorded_once(tabletop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy five existing demonstrations instead of recording new ones."""
    from imagewam_cli.sim import record

    def copied(environment: object, folder: Path, episodes: int) -> None:
        shutil.copytree(tabletop, folder)

    monkeypatch.setattr(record, "record", copied)


def test_a_build_is_compared_with_the_forward_passes_alone(
    tabletop: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), *SMALL_TINY, "--stride", "20"]
    options += ["--shard-mb", "0.1", "--repetitions", "1"]
    run = {"monkeypatch": monkeypatch, "capsys": capsys}
    text = output_of("builder", *options, **run)
    assert "| forward | " in text
    assert "| build | " in text
    result = json.loads(output_of("builder", *options, "--json", **run))
    assert result["share"] == pytest.approx(result["seconds"]["forward"] / result["seconds"]["build"])


def test_the_forward_passes_use_the_batches_of_the_build(tabletop: Path, load_tiny: Any, tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "builder.py"))
    dataset = open_dataset(tabletop)
    editor, codec = load_tiny(instructions_of(dataset)), Registry.installed().codecs.load("bf16")
    settings = BuildSettings(stride=4, batch=4, shard_mb=0.5)
    expected = [[r.row for r in batch] for batch in script["decoded"](dataset, editor, codec, settings)]
    seen: list[int] = []
    encode = editor.encode
    editor.encode = lambda images, texts: (seen.append(len(images)), encode(images, texts))[1]
    build_cache(dataset, editor, tmp_path / "cache", codec, settings)
    assert [len(batch) for batch in expected] == seen
    assert [row for batch in expected for row in batch] == CacheReader(tmp_path / "cache").index.row.tolist()


def test_builder_of_released_sizes_runs(tmp_path: Path, tabletop: Path, monkeypatch: Any, capsys: Any) -> None:
    options = ["--editor", "instruct-pix2pix", "--random", str(tmp_path), "--small", "--compute-dtype", "float32"]
    options += ["--dataset", str(tabletop), "--stride", "40", "--batch", "4", "--repetitions", "1", "--json"]
    assert json.loads(output_of("builder", *options, monkeypatch=monkeypatch, capsys=capsys))["rows"] >= 5


def test_the_memory_of_a_build_is_reported(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ["--rows", "30", "--weights", str(tiny_weights), "--json"]
    found = json.loads(output_of("builder_memory", *options, monkeypatch=monkeypatch, capsys=capsys))
    (build,) = found["builds"]
    assert 20 <= build["rows"] <= 80
    assert 1e8 < build["peak_bytes"] < 4e9
    assert found["growth_bytes"] == 0


def test_peak_memory_does_not_fall() -> None:
    peak_bytes = runpy.run_path(str(BENCHMARKS / "builder_memory.py"))["peak_bytes"]
    before = peak_bytes()
    held = [b"x" * 300_000_000 for _ in range(2)]
    held.clear()
    after = peak_bytes()
    held.append(b"x" * 1_000_000)
    assert before <= after == peak_bytes()
    assert after > 600e6


@pytest.mark.usefixtures("recorded_once")
def test_reading_is_compared_with_plain_reads(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ["--weights", str(tiny_weights), *SMALL_TINY, "--codecs", "bf16", "int4", "--repetitions", "1"]
    found = json.loads(output_of("reader", *options, "--json", monkeypatch=monkeypatch, capsys=capsys))
    assert [one["name"] for one in found["caches"]] == ["bf16", "int4"]
    ways = ["plain read", "plain read into aligned memory", "plain read, 1 MiB at a time"]
    ways += [*(f"{o}, {e} epoch" for e in ("first", "later") for o in ("sequential", "random"))]
    for one in found["caches"]:
        assert list(one["seconds"]) == [*ways, "random, later epoch, decoded"]
        assert one["shares"]["plain read"] == 1
        assert one["bytes"] % one["rows"] == 0


def test_an_existing_cache_is_read(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ["--cache", str(tiny_cache), "--load", "read", "--repetitions", "1", "--batch", "8"]
    assert "| random, later epoch | " in output_of("reader", *options, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.usefixtures("recorded_once")
def test_waiting_is_reported_as_a_share_of_step_time(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--weights", str(tiny_weights), *SMALL_TINY, "--stride", "20", "--steps", "3", "--repetitions", "1"]
    found = json.loads(output_of("waiting", *options, "--json", monkeypatch=monkeypatch, capsys=capsys))
    assert list(found["codecs"]) == ["bf16", "int4"]
    for one in found["codecs"].values():
        assert one["share"] == pytest.approx(one["wait_seconds_per_step"] / one["seconds_per_step"])


def test_waiting_times_are_medians_over_the_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ratio is the median of ratios, not the ratio of medians."""
    measure = runpy.run_path(str(BENCHMARKS / "waiting.py"))["measure"]
    runs = iter([(1.0, 0.5), (4.0, 0.4), (2.0, 0.3)])  # (seconds per step, seconds of waiting per step)
    monkeypatch.setitem(measure.__globals__, "tiny_caches", lambda *given: None)
    monkeypatch.setitem(measure.__globals__, "train", lambda *given: next(runs))
    found = measure(argparse.Namespace(codecs=["bf16"], repetitions=3, episodes=1, stride=1), tmp_path)
    assert found == {"bf16": {"seconds_per_step": 2.0, "wait_seconds_per_step": 0.4, "share": 0.15}}


def test_draws_are_compared_at_equal_times(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--cache", str(tiny_cache), "--batch", "4", "--draws", "1", "3", "--seconds", "0.2"]
    run = {"monkeypatch": monkeypatch, "capsys": capsys}
    assert "| planned s | 1 draws | 3 draws |" in output_of("draws", *options, **run)
    plot = tmp_path / "draws.png"
    found = json.loads(output_of("draws", *options, "--plot", str(plot), "--json", **run))
    assert [r["draws"] for r in found["runs"]] == [1, 3]
    for r in found["runs"]:
        assert len(r["points"]) == 5
        assert r["points"][-1]["step"] == r["steps"]
    assert plot.read_bytes().startswith(b"\x89PNG")

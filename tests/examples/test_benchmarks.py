"""The benchmarks run at tiny sizes; what they time is what they say."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imagewam_cli.editor import PrefixSettings
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.registry import Registry

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours, as they do when run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def output_of(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    path = BENCHMARKS / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    text: str = capsys.readouterr().out
    return text


def test_rounds_are_interleaved_and_the_first_does_not_count() -> None:
    interleaved = runpy.run_path(str(BENCHMARKS / "timing.py"))["interleaved"]
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("capture_overhead", ["bare", "recorded", "recorded, left early"]),
        ("prefill", ["padded", "padded, left early", "trimmed", "trimmed, left early"]),
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


def test_bytes_of_a_row_are_those_of_its_layout(tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "real_dimensions.py"))
    name = "instruct-pix2pix"
    script["PIPELINES"][name](Registry.installed().editors.get(name), tmp_path / name, True)
    settings = PrefixSettings(image_size=script["SMALL_SIZES"][name], cameras=("top",), compute_dtype="float32")
    found = script["measure"](name, tmp_path / name, settings, rows=3, batch=2)
    assert found["row_bytes"] == found["said_bytes"] > 0
    assert found["peak_bytes"] > found["weight_bytes"] > 0


def test_rows_are_measured_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ("--editor", "flux2-klein-4b", "--out", str(tmp_path), "--rows", "3", "--batch", "2", "--small")
    text = output_of("real_dimensions", *options, monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith("flux2-klein-4b, bfloat16, ")
    assert "3 rows in " in text
    assert "as its layout says" in text


def test_a_row_of_other_bytes_is_a_failure() -> None:
    report = runpy.run_path(str(BENCHMARKS / "real_dimensions.py"))["report"]
    with pytest.raises(SystemExit, match="a row has 10 bytes, its layout says 12"):
        report({"row_bytes": 10, "said_bytes": 12})


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
    assert sorted(built.values()) == sorted([entry.components["vae"], entry.parameters])


def test_a_cache_and_none_are_trained_side_by_side(
    tabletop: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--size", "64", "--codec", "fp32"]
    options += ["--stride", "40", "--batch", "4", "--precision", "float32"]
    run = {"monkeypatch": monkeypatch, "capsys": capsys}
    tables = output_of("online_or_cache", *options, "--draws", "2", "--steps", "2", **run)
    assert "| draws | cache, rows/s | online, rows/s | cache is won back after |" in tables
    assert "| steps | cache, 2 draws | online, 2 draws |" in tables
    options += ["--draws", "1", "3", "--steps", "3", "--json"]
    result = json.loads(output_of("online_or_cache", *options, **run))
    assert [(r["prefixes"], r["draws"]) for r in result["runs"]] == [
        *(("cache", 1), ("online", 1), ("cache", 3), ("online", 3))
    ]
    losses = [[point["loss"] for point in r["points"]] for r in result["runs"]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # the same rows and noise, so the times can be compared
    assert losses[2] == pytest.approx(losses[3], abs=1e-5)
    assert losses[0] != pytest.approx(losses[2], abs=1e-5)
    for r in result["runs"]:
        assert [point["step"] for point in r["points"]] == [1, 2, 3]
        assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(r["points"]))
        assert r["rows_per_second"] > 0


def test_a_cache_is_won_back_when_its_build_is_saved() -> None:
    script = runpy.run_path(str(BENCHMARKS / "online_or_cache.py"))
    build = script["Build"](rows=100, seconds=30.0)
    # a pass of 100 rows takes 10 s from the cache and 25 s online: 15 s saved each
    assert script["won_back"](build, 10.0, 4.0) == pytest.approx(2.0)
    assert script["won_back"](build, 4.0, 4.0) is None

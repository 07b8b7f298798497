"""Test the commands on a URL: build a cache in an S3 store, inspect it, train from it and verify it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli.app import run
from tests.support.stores import Store

SMALL = ("--image-size", "64x64", "--stride", "40", "--shard-mb", "0.02", "--layers", "0")
SECOND = "shards/shard-00001.safetensors"
BRIEFLY = ("--steps", "2", "--batch", "2", "--set", "expert.hidden=32", "--set", "expert.horizon=8")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run(["-q", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_cache_in_a_store_is_built_inspected_trained_from_and_verified(
    capsys: pytest.CaptureFixture[str], tabletop: Path, tiny_weights: Path, tmp_path: Path, s3: Store
) -> None:
    making = ["cache", "--dataset", str(tabletop), *SMALL, "--weights", str(tiny_weights)]
    made = printed(capsys, *making, "--out", f"{s3.url}/")
    assert (made["cache"], printed(capsys, "cache", "merge", s3.url)["rows"]) == (s3.url, made["rows"])
    local = str(tmp_path / "local")
    s3.fs.get(s3.root, local, recursive=True)
    assert printed(capsys, "info", s3.url) == printed(capsys, "info", local)

    policies = []
    for address in (local, s3.url):
        out = tmp_path / f"run-{len(policies)}"
        printed(capsys, "train-expert", "--cache", address, "--out", str(out), *BRIEFLY)
        assert json.loads((out / "run.json").read_text())["cache"] == address
        policies.append([path.read_bytes() for path in sorted((out / "policy").glob("*.safetensors"))])
    assert policies[0] == policies[1]

    s3.flip(SECOND, -9)
    assert run(["-q", "cache", "verify", "--cache", s3.url]) == 1
    assert f"{s3.url}/{SECOND}: 1 of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "URL"], 1, "error: URL is not a cache: it has no manifest.json\n"),
        (["cache", "verify", "--cache", "URL"], 1, "error: URL is not a cache: it has no manifest.json\n"),
        (["cache", "report", "--cache", "URL"], 1, "error: URL is not a cache: it has no manifest.json\n"),
        (["train-expert", "--cache", "URL"], 1, "error: URL is not a cache: it has no manifest.json\n"),
        (["cache", "merge", "URL"], 1, "error: URL contains no part of a cache\n"),
        (["info", "nosuch://a"], 2, "error: nosuch://a cannot store a cache: Protocol not known: nosuch\n"),
        (["cache", "verify", "--cache", "file:///no/where"], 2, "error: --cache /no/where does not exist\n"),
    ],
)
def test_errors_are_one_line_and_a_hint(
    capsys: pytest.CaptureFixture[str], memory: Store, arguments: list[str], code: int, message: str
) -> None:
    assert run([memory.url if argument == "URL" else argument for argument in arguments]) == code
    lines = capsys.readouterr().err
    assert lines.startswith(message.replace("URL", memory.url))
    assert lines.count("\n") == 2, "the output is not one line of error and one of hint"

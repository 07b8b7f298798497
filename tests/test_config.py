"""Test that errors of the strict configuration name the file, the key and the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from imagewam_cli.config import dump_yaml, from_dict, load_yaml, to_dict
from imagewam_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    pair: tuple[int, int] | None = None
    name: str | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Values:
    values: Mapping[str, object]


def test_a_mapping_to_objects_takes_any_value() -> None:
    values = {"flag": True, "none": None, "list": [1, "a"], "nested": {"x": 0.5}}
    assert from_dict(Values, {"values": values}).values == values


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = Outer(steps=3, inner=Inner(rate=0.5, kind="b"), sizes=(1, 2), pair=(4, 5), name="x", flag=True)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_yaml(path, Outer) == config
    assert from_dict(Outer, to_dict(config)) == config


def test_an_integer_is_accepted_for_a_float() -> None:
    assert from_dict(Inner, {"rate": 1}).rate == 1.0


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"steps": 1, "innr": {}}, "unknown key 'innr'", "did you mean 'inner'?"),
        ({"steps": 1, "inner": {"rte": 1.0}}, r"unknown key 'inner\.rte'", "did you mean 'rate'?"),
        ({"steps": "many"}, "steps must be int, got 'many'", None),
        ({"steps": True}, "steps must be int, got True", None),
        ({"steps": 1.5}, r"steps must be int, got 1\.5", None),
        ({"steps": 1, "inner": {"kind": "c"}}, r"inner\.kind is 'c'", "choose one of: a, b"),
        ({"steps": 1, "pair": [1]}, "pair needs 2 values, got 1", None),
        ({"steps": 1, "inner": 3}, "inner must be a mapping, got int", None),
        ({"steps": 0}, "steps must be at least 1, got 0", None),
        ({}, "key 'steps' is missing", None),
        ([], "the top level must be a mapping", None),
    ],
)
def test_errors_name_the_problem_and_its_place(values: Any, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(Outer, values, source="recipe.yaml")
    assert caught.value.message.startswith("recipe.yaml: ")
    if hint is not None:
        assert caught.value.hint == hint


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml", Outer)
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_yaml(broken, Outer)

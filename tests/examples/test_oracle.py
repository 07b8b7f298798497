"""Test the parts of the comparison with the published code that do not need the published numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from tests.support.paths import EXAMPLES

SCRIPT = EXAMPLES / "published" / "oracle.py"


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_has_a_line_per_case_and_blanks_for_missing_numbers(oracle: ModuleType) -> None:
    lines = oracle.table([("one", {"kv": 1e-6}), ("two", {"kv": 2.0, "action": 0.5})]).splitlines()
    assert [line.split() for line in lines] == [
        ["case", "kv", "action"],
        ["one", "1.0e-06"],
        ["two", "2.0e+00", "5.0e-01"],
    ]


def test_only_existing_cases_are_compared(oracle: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(
        json.dumps({"infer": {"a": {"steps": 1}, "b": {}}, "bf16": {"a": {"steps": 2}}})
    )
    for name in ("infer_a", "infer_a_bf16"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [(name, spec) for name, _, spec in oracle.cases(tmp_path, "infer")] == [("infer_a", {"steps": 1})]
    assert [(name, spec) for name, _, spec in oracle.cases(tmp_path, "bf16")] == [("infer_a_bf16", {"steps": 2})]


@pytest.mark.parametrize(("state", "action"), [(8, 7), (7, 8), (14, 14)])
def test_a_robot_may_have_more_states_than_actions(oracle: ModuleType, state: int, action: int) -> None:
    robot = oracle._robot(state, action)
    assert (len(set(robot.state_names)), len(set(robot.action_names))) == (state, action)

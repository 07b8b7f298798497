"""The small policy and its ONNX export, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.policies import exported, small_policy
from imagewam_cli.export import ExportReport


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, load_tiny: Any) -> Path:
    return small_policy(tmp_path_factory, load_tiny)


@pytest.fixture(scope="session")
def onnx_export(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, tiny_weights: Path) -> ExportReport:
    return exported(tmp_path_factory, policy_folder, tiny_weights)

"""Fixtures for all tests: a small untrained editor, a small dataset, and a cache of that dataset by that editor.

Each is made once, when a test first needs it. All are read-only: copy one before you damage it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

EDITOR_CAMERA = (64, 64)
"""(height, width) of the small editor's input, which gives 16 reference tokens."""


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline folder like `tiny`'s, but smaller: one double block, two single ones, 2 heads of 32."""
    from imagewam_tiny import architecture
    from tests.support.editors.flux2 import small_pipeline

    folder = tmp_path_factory.mktemp("weights") / "small"
    architecture.save_pipeline(small_pipeline(text_layers=3), folder)
    return folder


@pytest.fixture(scope="session")
def tabletop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five demonstrations of the tabletop's scripted demonstrator, with images stored as PNG."""
    from imagewam_cli.sim.record import record
    from imagewam_cli.sim.tabletop.env import TabletopEnvironment

    folder = tmp_path_factory.mktemp("tabletop") / "set"
    record(TabletopEnvironment(), folder, 5, video_codec=None)
    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_weights: Path) -> Any:
    """`load_tiny(instructions, **settings)` loads the small editor at 64 pixels; `weights=` names another folder."""
    from imagewam_cli.editors.installed import load_editor
    from imagewam_cli.editors.settings import PrefixOptions

    def load(instructions: Sequence[str] = (), weights: Path = tiny_weights, **settings: Any) -> Any:
        chosen = PrefixOptions(**{"image_size": EDITOR_CAMERA, "cameras": ("top",)} | settings)
        return load_editor("tiny", chosen, instructions=instructions, weights=weights)

    return load


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tabletop: Path, load_tiny: Any) -> Path:
    """A float32 cache of every fourth frame of `tabletop` by the small editor, with about one shard per episode."""
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.kvcache.building.build import build_cache
    from imagewam_cli.kvcache.building.encoding import instructions_of
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings
    from imagewam_cli.kvcache.codecs.cast import FLOAT32

    dataset = open_dataset(tabletop)
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    settings = BuildSettings(stride=4, batch=8, shard_mb=0.5)
    build_cache(dataset, load_tiny(instructions_of(dataset)), folder, FLOAT32, settings)
    return folder


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, load_tiny: Any) -> Path:
    """A small policy with random weights on the small editor."""
    from tests.support.policies import small_policy

    return small_policy(tmp_path_factory, load_tiny)


@pytest.fixture(scope="session")
def onnx_export(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, tiny_weights: Path) -> Any:
    """The ONNX export of `policy_folder`."""
    from tests.support.policies import exported

    return exported(tmp_path_factory, policy_folder, tiny_weights)

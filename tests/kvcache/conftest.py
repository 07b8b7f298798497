"""Fixture of a cache with five episodes in four shards, built by an editor that only does arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.stores import home, memory, s3, s3_address, store  # noqa: F401 - fixtures


@pytest.fixture
def dataset() -> MemoryDataset:
    return MemoryDataset(LENGTHS)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache. It is read-only: copy it before you damage it."""
    folder = tmp_path_factory.mktemp("cache") / "built"
    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), folder, FLOAT32, SETTINGS)
    return folder

"""Fixtures of three small datasets. They are made once and read-only: copy one before you damage it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recordings import Recording, record, write_v21, write_v30


@pytest.fixture(scope="session")
def recordings() -> list[Recording]:
    return record()


@pytest.fixture(scope="session")
def v30(tmp_path_factory: pytest.TempPathFactory, recordings: list[Recording]) -> Path:
    """A v3.0 dataset with all episodes in one data file and one mp4 per camera."""
    return write_v30(tmp_path_factory.mktemp("v30") / "set", recordings)


@pytest.fixture(scope="session")
def v30_pictures(tmp_path_factory: pytest.TempPathFactory, recordings: list[Recording]) -> Path:
    """A v3.0 dataset with PNG images inside the data file."""
    return write_v30(tmp_path_factory.mktemp("v30") / "set", recordings, video_codec=None)


@pytest.fixture(scope="session")
def v21(tmp_path_factory: pytest.TempPathFactory, recordings: list[Recording]) -> Path:
    """A v2.1 dataset with one data file and one mp4 per camera for each episode."""
    return write_v21(tmp_path_factory.mktemp("v21") / "set", recordings)

"""Fixture of a small recorded dataset for all tests in this folder."""

from __future__ import annotations

import pytest

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Dataset
from imagewam_cli.sim.record import record
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three tabletop demonstrations with losslessly stored images."""
    folder = tmp_path_factory.mktemp("demonstrations") / "set"
    record(TabletopEnvironment(), folder, 3, video_codec=None)
    return open_dataset(folder)

"""Test the half of the lerobot check that runs in imagewam's environment."""

import runpy
from pathlib import Path

import numpy as np

from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "open_with_lerobot.py"


def test_frames_are_written_with_lerobots_keys(tabletop: Path, tmp_path: Path) -> None:
    runpy.run_path(str(EXAMPLE))["write"](str(tabletop), str(tmp_path / "frames.npz"))
    values = np.load(tmp_path / "frames.npz")
    count = len(values["action"])
    assert count > 25
    assert values["observation.images.top"].shape == (count, 128, 128, 3)
    assert values["observation.state"].shape == (count, 3)
    assert str(values["task"][0])
    assert values["frame_index"][:3].tolist() == [0, 1, 2]

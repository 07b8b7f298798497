"""`EditorContract`: the checks of the editor contract as pytest tests. Inherit from it in your plugin's tests:

    class TestMine(EditorContract):
        name = "mine"
        image_size = (64, 64)

        @pytest.fixture(scope="class")
        @classmethod
        def folder(cls, tmp_path_factory):
            return build_tiny_pipeline(tmp_path_factory.mktemp("mine"))

Each check is one test in each mode of the editor's entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest

from imagewam_cli.testing.checks import CHECKS, Check
from imagewam_cli.testing.subject import NotApplicable, Subject, subjects


class EditorContract:
    """Checks of the installed editor `name`."""

    name: ClassVar[str]
    """Name in its `EditorEntry`."""
    image_size: ClassVar[tuple[int, int] | None] = None
    """(height, width) of the picture; None: the editor's default. Small pictures are fast."""
    compute_dtype: ClassVar[Literal["float32", "bfloat16", "float16"]] = "float32"
    """float32 finds the most errors, because other dtypes need larger tolerances."""
    device: ClassVar[str] = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls) -> Path | None:
        """Return a pipeline folder with the weights; None: the embedded or downloaded ones."""
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def modes(cls, folder: Path | None) -> dict[str, Subject]:
        """Return the editor in each of its modes. Checks share the editors that they load."""
        in_each_mode = subjects(
            cls.name,
            weights=folder,
            image_size=cls.image_size,
            compute_dtype=cls.compute_dtype,
            device=cls.device,
        )
        return {subject.mode: subject for subject in in_each_mode}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"check", "mode"} <= set(metafunc.fixturenames):
            pairs = [(check, subject.mode) for subject in subjects(self.name) for check in CHECKS]
            metafunc.parametrize(("check", "mode"), pairs, ids=[f"{mode}-{check.__name__}" for check, mode in pairs])

    def test_promise(self, check: Check, mode: str, modes: dict[str, Subject]) -> None:
        try:
            check(modes[mode])
        except NotApplicable as reason:
            pytest.skip(str(reason))

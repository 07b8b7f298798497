"""`EditorContract`: every promise of an editor as a pytest test. Inherit it in your plugin's tests:

    class TestMine(EditorContract):
        name = "mine"
        image_size = (64, 64)

        @pytest.fixture(scope="class")
        @classmethod
        def folder(cls, tmp_path_factory):
            return build_tiny_pipeline(tmp_path_factory.mktemp("mine"))

Each promise is one test in each mode of the editor's entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest

from imagewam_cli.testing.checks import CHECKS, Check
from imagewam_cli.testing.subject import NotApplicable, Subject, subjects


class EditorContract:
    """The promises of the editor `name`, which must be installed."""

    name: ClassVar[str]
    """As in its `EditorEntry`."""
    image_size: ClassVar[tuple[int, int] | None] = None
    """(height, width) of the picture; None: the editor's own. Small is quick."""
    compute_dtype: ClassVar[Literal["float32", "bfloat16", "float16"]] = "float32"
    """Others leave room for larger errors, and find fewer."""
    device: ClassVar[str] = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls) -> Path | None:
        """The weights: a pipeline folder. None: what came with the plugin or was fetched."""
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def modes(cls, folder: Path | None) -> dict[str, Subject]:
        """The editor in each of its modes. What a check has loaded is there for the next."""
        found = subjects(
            cls.name,
            weights=folder,
            image_size=cls.image_size,
            compute_dtype=cls.compute_dtype,
            device=cls.device,
        )
        return {subject.mode: subject for subject in found}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"check", "mode"} <= set(metafunc.fixturenames):
            pairs = [(check, subject.mode) for subject in subjects(self.name) for check in CHECKS]
            metafunc.parametrize(("check", "mode"), pairs, ids=[f"{mode}-{check.__name__}" for check, mode in pairs])

    def test_promise(self, check: Check, mode: str, modes: dict[str, Subject]) -> None:
        try:
            check(modes[mode])
        except NotApplicable as reason:
            pytest.skip(str(reason))  # the check has nothing to ask of this editor, and says why

"""Fixtures of builds by several workers, for any engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.kvcache.building.build import build_with
from imagewam_cli.kvcache.building.workers.pool import WorkerPool, Workers
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.format.manifest import Manifest
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import MemoryDataset
from tests.support.worker_jobs import ArithmeticJob, Build


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ArithmeticJob]:
    marks = tmp_path / "marks"
    marks.mkdir()
    return lambda **values: ArithmeticJob(out=tmp_path / "cache", marks=marks, **values)


@pytest.fixture
def build_by(tmp_path: Path) -> Build:
    """`build_by(workers)` builds the cache `built` into `tmp_path / "cache"`."""

    def build(workers: Workers, *, on_news: Callable[[str], None] = lambda line: None, **options: Any) -> Manifest:
        dataset, out = MemoryDataset(LENGTHS), tmp_path / "cache"
        with WorkerPool(workers, out=out, identity=dataset.info.identity, on_news=on_news) as pool:
            return build_with(pool, dataset, out, FLOAT32, SETTINGS, **options)

    return build

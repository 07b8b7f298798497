"""The dataset and the editor that a cache was made with, opened again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from imagewam_cli.cli.options import existing, existing_dataset

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.editors.loading.hardware import Hardware
    from imagewam_cli.kvcache.format.manifest import Manifest


def cache_origin(
    manifest: Manifest, dataset: Path | None, weights: Path | None, hardware: Hardware
) -> tuple[Dataset, Editor]:
    """dataset, weights: where they have moved to; None: where the manifest and the editor say.

    Raises:
        CacheError: another dataset or editor than the cache was made with.
        DatasetError, EditorError: they are not there.
    """
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.editors.installed import load_editor
    from imagewam_cli.errors import CacheError
    from imagewam_cli.kvcache.building.verify import require_origin
    from imagewam_cli.registry import Registry

    name = str(manifest.fingerprint["editor"])
    if name not in Registry.installed().editors:
        raise CacheError(
            f"the cache was made with the editor {name!r}, which is not installed",
            "install its plugin; see `imagewam plugins --hook editors`",
        )
    if dataset is None:
        path = existing("the cache's dataset", Path(manifest.dataset.path), "say with --dataset where it has moved")
    else:
        path = existing_dataset(dataset)
    source = open_dataset(path, manifest.dataset.keys)
    editor = load_editor(
        name,
        manifest.settings,
        instructions=manifest.instructions,
        weights=weights,
        hardware=hardware,
    )
    require_origin(manifest, source, editor)
    return source, editor

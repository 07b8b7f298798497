"""Open the dataset and the editor that a cache was built from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from imagewam_cli.cli.options import existing_dataset, require_existing

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.editors.loading.hardware import Hardware
    from imagewam_cli.kvcache.format.manifest import Manifest
    from imagewam_cli.kvcache.storage.contract import Storage


@contextmanager
def needs_every_episode() -> Iterator[None]:
    """Replace hints to leave episodes out: what works on a cache needs every episode that the cache holds."""
    from imagewam_cli.data.episodes import EXCLUDE, ONLY
    from imagewam_cli.errors import DatasetError

    try:
        yield
    except DatasetError as error:
        if error.hint is not None and (EXCLUDE in error.hint or ONLY in error.hint):
            raise DatasetError(
                error.message, "copy or download these files again: the cache was built from all its episodes"
            ) from error
        raise


def open_cache_source(
    storage: Storage, manifest: Manifest, dataset: Path | None, weights: Path | None, hardware: Hardware
) -> tuple[Dataset, Editor]:
    """Return the dataset and the editor of a cache.

    Args:
        dataset: New folder of the dataset; None: the folder recorded in the manifest.
        weights: Folder of the weights; None: the editor's embedded or downloaded weights.

    Raises:
        CacheError: the cache was built from a different dataset or editor.
        DatasetError: the dataset is damaged.
        EditorError: the weights are missing.
    """
    from imagewam_cli.data.episodes import EpisodeSelection
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.editors.installed import load_editor
    from imagewam_cli.errors import CacheError
    from imagewam_cli.kvcache.building.verify import require_provenance
    from imagewam_cli.registry import Registry

    name = str(manifest.fingerprint["editor"])
    if name not in Registry.installed().editors:
        raise CacheError(
            f"the cache was built with the editor {name!r}, which is not installed",
            "install its plugin; see `imagewam plugins --hook editors`",
        )
    if dataset is None:
        path = require_existing(
            "the cache's dataset", Path(manifest.dataset.path), "pass its new folder with --dataset"
        )
    else:
        path = existing_dataset(dataset)
    source = open_dataset(path, manifest.dataset.keys, EpisodeSelection.of(manifest.dataset.selected))
    editor = load_editor(
        name,
        manifest.settings,
        instructions=manifest.instructions,
        weights=weights,
        hardware=hardware,
    )
    require_provenance(storage, manifest, source, editor)
    return source, editor

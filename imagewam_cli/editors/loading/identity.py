"""Identity of an editor's weights: a SHA-256 over the files that loading reads, by their content.

Names of blobs in the Hub's cache are not trusted: a disk or a program may have changed the bytes behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from imagewam_cli.editors.loading.checksums import FileState, checksum
from imagewam_cli.editors.loading.fit import stem_of
from imagewam_cli.editors.loading.hub_files import is_loaded_file
from imagewam_cli.editors.loading.weight_files import is_adapter, loaded_names
from imagewam_cli.errors import EditorError


class LoadedFiles:
    """The files that loading an editor reads. Create it before they are read, so that a change is noticed."""

    def __init__(self, folders: Mapping[str, Path], classes: Mapping[str, type]) -> None:
        """folders: sub-folder -> the pipeline folder that contains it; classes: sub-folder -> class."""
        self._all = _readable(folders)
        self._used = {name: path for name, path in self._all.items() if _is_used(name, folders, classes)}
        self._states = {path: FileState.of(path) for path in self._used.values()}

    def digest(self) -> str:
        """Return the SHA-256 over names and contents of the files that are used.

        Raises:
            EditorError: a file changed after this object was created.
        """
        found = _digest(self._used)
        for path, state in self._states.items():
            if not path.exists() or FileState.of(path) != state:
                raise EditorError(f"{path} changed while the editor was loaded", "run the command again")
        return found

    def former_digest(self) -> str | None:
        """Return the digest as older versions computed it, with LoRAs and weights that are not used; None if there are
        none."""
        return _digest(self._all) if len(self._all) > len(self._used) else None


def _readable(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return every file that a component might read: name in the pipeline -> path, in the order of the digest."""
    found = {
        path.relative_to(home).as_posix(): path
        for part, home in folders.items()
        for path in (home / part).rglob("*")
        if is_loaded_file(path.name) and path.is_file()
    }
    return dict(sorted(found.items(), key=lambda item: Path(item[0])))


def _is_used(name: str, folders: Mapping[str, Path], classes: Mapping[str, type]) -> bool:
    part, _, inside = name.partition("/")
    if is_adapter(Path(name).name):
        return False
    if not name.endswith((".safetensors", ".safetensors.index.json")) or not issubclass(classes[part], nn.Module):
        return True
    return inside in loaded_names(folders[part] / part, stem_of(classes[part]))


def _digest(files: Mapping[str, Path]) -> str:
    total = hashlib.sha256()
    for name, content in _checksums(files.items()):
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()


def _checksums(files: Iterable[tuple[str, Path]]) -> Iterable[tuple[str, str]]:
    return ((name, checksum(path)) for name, path in files)

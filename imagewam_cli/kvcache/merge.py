"""Parts of a cache, built by workers that know nothing of each other, become one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.lock import part_lock, write_lock
from imagewam_cli.kvcache.manifest import (
    MANIFEST,
    SHARDS,
    Manifest,
    has_checksum,
    part_manifests,
    read_manifest_file,
    sync_folder,
    unite,
    write_atomically,
    write_manifest,
)
from imagewam_cli.kvcache.shard import Shard


def merge_cache(out: Path, others: Sequence[Path] = ()) -> Manifest:
    """Unite the parts in `out`, and those in other folders, which are copied and stay as they are. The manifest comes
    last; then the parts' own go. To do it twice, or over a finished cache, changes nothing.

    Raises:
        CacheError: nothing to merge, parts of different caches, a part in `out` that is being built, or a shard that
            is not what its manifest says.
    """
    with _made(out), ExitStack() as locks:
        locks.enter_context(write_lock(out))
        own = part_manifests(out)
        for path in own:
            locks.enter_context(write_lock(out, part_lock(path.name)))
        found = [(path, read_manifest_file(path)) for folder in (out, *others) for path in _manifests(folder)]
        if not found:
            raise CacheError(f"{out} has no part of a cache", "build parts with `imagewam cache --part i/N`")
        manifest = unite(found)
        for path, part in found:
            _bring(path.parent, part, out)
        write_manifest(out, manifest)
        for path in own:
            path.unlink()
        sync_folder(out)
    return manifest


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder; one that was made for nothing goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def _manifests(folder: Path) -> list[Path]:
    whole = folder / MANIFEST
    return [*([whole] if whole.exists() else []), *part_manifests(folder)]


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.partial")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _bring(folder: Path, part: Manifest, out: Path) -> None:
    """Shards and files of a part, looked at before they are listed, into `out`."""
    (out / SHARDS).mkdir(exist_ok=True)
    for entry in part.shards:
        shard = Shard.open(folder / SHARDS / entry.file)
        shard.require_listed(entry.bytes, entry.checksum)
        if folder != out:
            _copy(shard.path, out / SHARDS / entry.file)
    for name, checksum in part.files.items():
        if not has_checksum(out / name, checksum):
            if not has_checksum(folder / name, checksum):
                raise CacheError(f"{folder / name} is missing or damaged", "run the part's command again")
            write_atomically(out / name, (folder / name).read_bytes())
    sync_folder(out / SHARDS)

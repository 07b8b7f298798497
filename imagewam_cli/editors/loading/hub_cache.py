"""The snapshots of an editor's repository in the Hub's cache on this disk. Nothing here uses the network."""

from __future__ import annotations

import os
from pathlib import Path

from imagewam_cli.editors.loading.hub_files import VARIANTS, patterns
from imagewam_cli.errors import EditorError
from imagewam_cli.hookspecs import EditorEntry

BRANCH = "main"
"""The branch that an editor loads."""


def find_snapshot(entry: EditorEntry) -> Path:
    """Return the snapshot of the default branch on this disk, without network access.

    Raises:
        EditorError: there is none, or it is not complete; the hint names the `imagewam fetch` to run and any complete
            revision.
    """
    found = complete_snapshot(entry, BRANCH)
    if found is not None:
        return found
    complete, partial = _other_revisions(entry)
    state = f"incomplete on this machine (revision {partial.name})" if partial is not None else "not on this machine"
    folder = "DIR" if complete is None else str(complete)
    raise EditorError(
        f"the weights of {entry.name!r} are {state}",
        f"run `imagewam fetch {entry.name}`, or pass a diffusers folder with --weights {folder}",
    )


def is_default_snapshot(entry: EditorEntry, folder: Path) -> bool:
    """Return whether the editor loads this folder without `--weights`."""
    return complete_snapshot(entry, BRANCH) == folder


def complete_snapshot(entry: EditorEntry, revision: str, cache_dir: Path | None = None) -> Path | None:
    """Return the snapshot of a branch or commit on this disk, if it has every file that the plugin reads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            str(entry.repo),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=True,
            allow_patterns=patterns(entry),
            ignore_patterns=list(VARIANTS),
        )
    except (LocalEntryNotFoundError, OSError):
        return None
    folder = Path(snapshot)
    return folder if all((folder / component).is_dir() for component in entry.components) else None


def write_ref(folder: Path, revision: str, commit: str) -> None:
    """Record in the Hub's cache that the branch or tag `revision` is `commit`, in its own layout: refs/REVISION next to
    snapshots/COMMIT, which is `folder`."""
    note = folder.parents[1] / "refs" / revision
    if revision == commit or (
        note.is_file() and note.read_text(encoding="utf-8") == commit
    ):  # the cache may be read-only
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    fresh.write_text(commit, encoding="utf-8")
    fresh.replace(note)


def remove_file(path: Path) -> None:
    """Remove a file of a snapshot, and the file of the Hub's cache that it links to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _other_revisions(entry: EditorEntry) -> tuple[Path | None, Path | None]:
    """Return the newest complete and the newest incomplete snapshot of the repository in the default cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return None, None
    revisions = [r for repo in repos if (repo.repo_id, repo.repo_type) == (entry.repo, "model") for r in repo.revisions]
    revisions.sort(key=lambda r: r.last_modified, reverse=True)
    complete = [r.snapshot_path for r in revisions if complete_snapshot(entry, r.commit_hash) is not None]
    partial = [r.snapshot_path for r in revisions if r.snapshot_path not in complete]
    return next(iter(complete), None), next(iter(partial), None)

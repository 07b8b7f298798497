"""Download an editor's weights from the Hugging Face Hub: the components that its plugin reads, and nothing else.

huggingface_hub keeps finished files and respects offline mode. This module adds the rest: it selects the components
that are read, rejects pickles, checks the free disk space, compares checksums, and raises one clear error per failure.
`hub_client` waits and tries again, and `hub_failure` and `hub_errors` name the causes.

The plan resolves a branch or tag to a commit once, and only that commit is downloaded. The cache's reference for the
branch moves after the last file. Planning therefore changes nothing on disk, and editors load the older revision until
the newer one is complete.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.editors.loading import hub_failure
from imagewam_cli.editors.loading.hub_cache import BRANCH, complete_snapshot, remove_file, write_ref
from imagewam_cli.editors.loading.hub_client import Say, patient_client
from imagewam_cli.editors.loading.hub_errors import converting_errors
from imagewam_cli.editors.loading.hub_failure import AGAIN
from imagewam_cli.editors.loading.hub_files import is_loaded_file, patterns, require_safetensors
from imagewam_cli.editors.loading.hub_options import FetchOptions, require_folder, require_room, sound_token
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.files import sha256_of
from imagewam_cli.hookspecs import EditorEntry

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo
    from huggingface_hub.hf_api import RepoSibling


def _silent(line: str) -> None:
    """Say nothing."""


def _unheard(count: int) -> None:
    """Tell nobody about arrived bytes."""


@dataclass(frozen=True, kw_only=True)
class FetchFile:
    """One file to download."""

    name: str
    bytes: int
    present: bool
    """Whether the file is already on this disk."""
    sha256: str | None = None
    """Checksum of a file of weights; None if the Hub names none."""


@dataclass(frozen=True, kw_only=True)
class FetchPlan:
    """Files of a download."""

    editor: str
    repo: str
    revision: str
    """Resolved commit."""
    files: tuple[FetchFile, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files, present or not."""
        return sum(f.bytes for f in self.files)

    @property
    def missing_bytes(self) -> int:
        """Size of the files that are not on this disk."""
        return sum(f.bytes for f in self.files if not f.present)


def plan_fetch(entry: EditorEntry, options: FetchOptions, *, say: Say = _silent) -> FetchPlan:
    """Ask the Hub which files a download needs. say: prints a line when a request is tried again.

    Raises:
        UsageError: the editor's weights come with its plugin, the patterns match nothing, or an environment variable
            has a wrong value.
        EditorError: the repository is missing, gated, unreachable, or has no safetensors for a component.
    """
    if entry.repo is None:
        raise UsageError(f"the weights of {entry.name!r} come with its plugin", "there is nothing to fetch")
    hub_failure.require_sound_settings()
    require_folder(options)
    options = replace(options, token=sound_token(options.token))
    with converting_errors(entry), patient_client(say), _no_bars():
        commit, known = _commit(entry, options)
        listed = _list_files(entry, options, commit)
    wanted = [f for f in listed if _is_requested(f.filename, entry, options)]
    if not options.include:
        for component in entry.components:
            require_safetensors(entry, component, [f.filename for f in listed])
    if not wanted:
        raise UsageError(f"no file of {entry.repo} matches", f"it has {len(listed)} files; see --include and --exclude")
    files = (_fetch_file(f, known.get(f.filename)) for f in wanted)
    return FetchPlan(editor=entry.name, repo=entry.repo, revision=commit, files=tuple(files))


def fetch(
    entry: EditorEntry,
    options: FetchOptions,
    plan: FetchPlan,
    *,
    on_bytes: Callable[[int], None] = _unheard,
    say: Say = _silent,
) -> Path:
    """Download the missing files of a plan, and return the folder.

    `find_snapshot` finds the default branch in the default cache; any other folder needs `--weights`.

    Args:
        on_bytes: called with the number of bytes after every part that arrived.
        say: prints a line when a request is tried again.

    Raises:
        EditorError: the folder cannot be written, the connection failed, or a file arrived damaged; complete files are
            kept.
    """
    if plan.missing_bytes:
        require_folder(options, writable=True)
    options = replace(options, token=sound_token(options.token))
    require_room(options, plan.repo, plan.missing_bytes)
    with converting_errors(entry), patient_client(say), _no_bars():
        if options.local_dir is None:
            _remove_damaged(entry, options, plan)
        names = [f.name for f in plan.files]
        folder = Path(_download(entry, options, plan.revision, allow=names, on_bytes=on_bytes))
    _require_checksums(folder, plan)
    if options.local_dir is None and complete_snapshot(entry, plan.revision, options.cache_dir):
        write_ref(folder, options.revision or BRANCH, plan.revision)
    return folder


def _commit(entry: EditorEntry, options: FetchOptions) -> tuple[str, Mapping[str, RepoSibling]]:
    """Return the current commit of the branch or tag, and what the Hub says about each of its files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=options.endpoint, token=options.token)
    info = api.model_info(str(entry.repo), revision=options.revision, files_metadata=True)
    if info.sha is None:
        raise EditorError(f"the Hub names no commit of {entry.repo}", "set HF_ENDPOINT to the address of a Hub")
    return info.sha, {f.rfilename: f for f in info.siblings or ()}


def _fetch_file(file: DryRunFileInfo, known: RepoSibling | None) -> FetchFile:
    """Return a file of the plan. A file of the Hub's cache that lost its end is not present."""
    path, size = Path(file.local_path), None if known is None else known.size
    whole = size is None or not path.is_file() or path.stat().st_size == size
    return FetchFile(
        name=file.filename,
        bytes=size if size is not None else file.file_size or 0,
        present=not file.will_download and whole,
        sha256=known.lfs.sha256 if known is not None and known.lfs is not None else None,
    )


def _list_files(entry: EditorEntry, options: FetchOptions, commit: str) -> list[DryRunFileInfo]:
    """List the repository's files, and which of them are on this disk."""
    files: list[DryRunFileInfo]
    if options.local_dir is None or options.local_dir.exists():
        files = _download(entry, options, commit, dry_run=True)
        return files
    with tempfile.TemporaryDirectory() as empty:  # huggingface_hub would create the local folder just to list files
        files = _download(entry, replace(options, local_dir=Path(empty)), commit, dry_run=True)
    return files


def _download(
    entry: EditorEntry,
    options: FetchOptions,
    commit: str,
    *,
    dry_run: bool = False,
    allow: Sequence[str] | None = None,
    on_bytes: Callable[[int], None] = _unheard,
) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        str(entry.repo),
        revision=commit,
        cache_dir=options.cache_dir,
        local_dir=options.local_dir,
        token=options.token,
        endpoint=options.endpoint,
        max_workers=options.max_workers,
        allow_patterns=list(allow) if allow is not None else None,
        tqdm_class=_byte_counter(on_bytes),
        dry_run=dry_run,
    )


def _byte_counter(on_bytes: Callable[[int], None]) -> Any:
    """Return a class of bars for huggingface_hub that shows nothing and passes on how many bytes of files arrived."""
    from huggingface_hub.utils.tqdm import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # Xet transfers fewer bytes than it writes, and counts them in a bar of this name
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                on_bytes(int(n))
            return None

    return Counter


def _remove_damaged(entry: EditorEntry, options: FetchOptions, plan: FetchPlan) -> None:
    """Remove files of the Hub's cache that the plan calls missing: they have the wrong size."""
    from huggingface_hub import try_to_load_from_cache

    for file in plan.files:
        found = try_to_load_from_cache(plan.repo, file.name, cache_dir=options.cache_dir, revision=plan.revision)
        if not file.present and isinstance(found, str):
            remove_file(Path(found))


def _require_checksums(folder: Path, plan: FetchPlan) -> None:
    """Compare the downloaded files with the sizes and checksums of the Hub, and remove those that differ.

    Raises:
        EditorError: a file arrived damaged.
    """
    for file in plan.files:
        path = folder / file.name
        if file.present or not path.is_file():
            continue
        if file.sha256 is not None:
            found = sha256_of(path)
            if found != file.sha256:
                remove_file(path)
                raise EditorError(
                    f"{file.name} arrived damaged: its SHA-256 begins with {found[:12]}, and the Hub's with "
                    f"{file.sha256[:12]}",
                    f"{AGAIN}; if it happens again, a mirror or proxy changes the file",
                )


def _is_requested(name: str, entry: EditorEntry, options: FetchOptions) -> bool:
    if any(fnmatch(name, pattern) for pattern in options.exclude):
        return False
    if options.include:
        return any(fnmatch(name, pattern) for pattern in options.include)
    return is_loaded_file(name) and any(fnmatch(name, pattern) for pattern in patterns(entry))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the bars and the talk of huggingface_hub: the command has its own."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide, level = not are_progress_bars_disabled(), logging.get_verbosity()
    if hide:
        disable_progress_bars()
    logging.set_verbosity(40)  # of logging.ERROR
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()

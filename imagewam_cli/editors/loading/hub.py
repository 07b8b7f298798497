"""Download an editor's weights from the Hugging Face Hub: the components that its plugin reads, and nothing else.

huggingface_hub keeps finished files, resumes broken downloads and respects offline mode. This module adds the
rest: it selects the components that are read, rejects pickles, checks the free disk space, and raises one clear error
per failure.

The plan resolves a branch or tag to a commit once, and only that commit is downloaded. The cache's reference for the
branch moves after the last file. Planning therefore changes nothing on disk, and editors load the older revision until
the newer one is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.hookspecs import EditorEntry

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo
    from huggingface_hub.errors import HfHubHTTPError

_WEIGHTS = "*.safetensors"
_READ = (_WEIGHTS, "*.json", "*.txt", "*.jinja", "*.model")
_VARIANTS = ("*.*.safetensors", "*.index.*.json", "*.*.*.index.json")
"""Second copies of the same weights, which diffusers and transformers mark with an arbitrary word (fp16, non_ema):
NAME.WORD.safetensors, in shards NAME.WORD-00001-of-00002.safetensors or NAME-00001-of-00002.WORD.safetensors, with the
index NAME.safetensors.index.WORD.json or NAME.safetensors.WORD.index.json. Names of plain weights have no dot."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BRANCH = "main"
_AGAIN = "run the same command again: complete files are kept"
_MARGIN = 1.05
"""Required free space, relative to the size of the files."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Options of a download, with the names of `hf download`."""

    revision: str | None = None
    include: tuple[str, ...] = ()
    """Patterns instead of the plugin's own choice."""
    exclude: tuple[str, ...] = ()
    local_dir: Path | None = None
    cache_dir: Path | None = None
    token: str | None = None
    max_workers: int = 8


@dataclass(frozen=True, kw_only=True)
class FetchFile:
    """One file to download."""

    name: str
    bytes: int
    present: bool
    """Whether the file is already on this disk."""


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


def plan_fetch(entry: EditorEntry, options: FetchOptions) -> FetchPlan:
    """Ask the Hub which files a download needs.

    Raises:
        UsageError: the editor's weights come with its plugin, or the patterns match nothing.
        EditorError: the repository is missing, gated, unreachable, or has no safetensors for a component.
    """
    if entry.repo is None:
        raise UsageError(f"the weights of {entry.name!r} come with its plugin", "there is nothing to fetch")
    with _converting_errors(entry, planning=True), _bars(shown=False):
        commit = _commit(entry, options)
        listed = _list_files(entry, options, commit)
    wanted = [f for f in listed if _is_requested(f.filename, entry, options)]
    if not options.include:
        for component in entry.components:
            _require_safetensors(entry, component, [f.filename for f in listed])
    if not wanted:
        raise UsageError(f"no file of {entry.repo} matches", f"it has {len(listed)} files; see --include and --exclude")
    return FetchPlan(
        editor=entry.name,
        repo=entry.repo,
        revision=commit,
        files=tuple(FetchFile(name=f.filename, bytes=f.file_size or 0, present=not f.will_download) for f in wanted),
    )


def fetch(entry: EditorEntry, options: FetchOptions, plan: FetchPlan, *, bars: bool = True) -> Path:
    """Download the missing files of a plan, and return the folder. bars: show progress on stderr.

    `find_snapshot` finds the default branch in the default cache; any other folder needs `--weights`.

    Raises:
        EditorError: the disk is full, or the connection failed; complete files are kept.
    """
    _require_room(plan, options)
    with _converting_errors(entry), _bars(shown=bars):
        folder = Path(_download(entry, options, plan.revision, allow=[f.name for f in plan.files]))
    if options.local_dir is None and _complete_snapshot(entry, plan.revision, options.cache_dir):
        _write_ref(folder, options.revision or _BRANCH, plan.revision)
    return folder


def find_snapshot(entry: EditorEntry) -> Path:
    """Return the snapshot of the default branch on this disk, without network access.

    Raises:
        EditorError: there is none, or it is not complete; the hint names the `imagewam fetch` to run and any complete
            revision.
    """
    found = _complete_snapshot(entry, _BRANCH)
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
    return _complete_snapshot(entry, _BRANCH) == folder


def is_loaded_file(name: str) -> bool:
    """Return whether loading a part reads a file of this name: weights, configs, tokenizers, but no second copies."""
    return any(fnmatch(name, p) for p in _READ) and not any(fnmatch(name, p) for p in _VARIANTS)


def _commit(entry: EditorEntry, options: FetchOptions) -> str:
    """Return the current commit of the branch or tag."""
    from huggingface_hub import HfApi

    return str(HfApi(token=options.token).model_info(str(entry.repo), revision=options.revision).sha)


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
    entry: EditorEntry, options: FetchOptions, commit: str, *, dry_run: bool = False, allow: Sequence[str] | None = None
) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        str(entry.repo),
        revision=commit,
        cache_dir=options.cache_dir,
        local_dir=options.local_dir,
        token=options.token,
        max_workers=options.max_workers,
        allow_patterns=list(allow) if allow is not None else None,
        dry_run=dry_run,
    )


def _complete_snapshot(entry: EditorEntry, revision: str, cache_dir: Path | None = None) -> Path | None:
    """Return the snapshot of a branch or commit on this disk, if it has every file that the plugin reads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            str(entry.repo),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=True,
            allow_patterns=_patterns(entry),
            ignore_patterns=list(_VARIANTS),
        )
    except (LocalEntryNotFoundError, OSError):
        return None
    folder = Path(snapshot)
    return folder if all((folder / component).is_dir() for component in entry.components) else None


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
    complete = [r.snapshot_path for r in revisions if _complete_snapshot(entry, r.commit_hash) is not None]
    partial = [r.snapshot_path for r in revisions if r.snapshot_path not in complete]
    return next(iter(complete), None), next(iter(partial), None)


def _write_ref(folder: Path, revision: str, commit: str) -> None:
    """Record in the Hub's cache that the branch or tag `revision` is `commit`, in its own layout: refs/REVISION next to
    snapshots/COMMIT, which is `folder`."""
    note = folder.parents[1] / "refs" / revision
    if revision == commit or (note.is_file() and note.read_text() == commit):  # the cache may be read-only
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    fresh.write_text(commit)
    fresh.replace(note)


def _patterns(entry: EditorEntry) -> list[str]:
    """Return huggingface_hub's patterns of the files that the plugin reads."""
    return ["model_index.json", *(f"{c}/{kind}" for c in entry.components for kind in _READ)]


def _is_requested(name: str, entry: EditorEntry, options: FetchOptions) -> bool:
    if any(fnmatch(name, pattern) for pattern in options.exclude):
        return False
    if options.include:
        return any(fnmatch(name, pattern) for pattern in options.include)
    return is_loaded_file(name) and any(fnmatch(name, pattern) for pattern in _patterns(entry))


def _require_safetensors(entry: EditorEntry, component: str, names: Sequence[str]) -> None:
    """Check that a component has files and, if it has parameters, safetensors weights in the standard precision.

    Raises:
        EditorError: it has no files, or its weights are only pickles or second copies.
    """
    inside = [n for n in names if n.startswith(f"{component}/")]
    if not inside:
        raise EditorError(f"{entry.repo} has no {component}/: it is not a {entry.family} repository")
    weights = [n for n in inside if fnmatch(n, _WEIGHTS)]
    pickled = [n for n in inside if any(fnmatch(n, p) for p in _PICKLES)]
    if any(is_loaded_file(n) for n in weights) or not (pickled or entry.components[component].parameters):
        return
    hint = "choose a --revision with safetensors, or convert them and pass the folder with --weights DIR"
    if weights:
        raise EditorError(
            f"{entry.repo} has safetensors of {component}/ only as a variant ({weights[0]}), which is not read", hint
        )
    if pickled:
        raise EditorError(
            f"{entry.repo} has weights of {component}/ only as a pickle ({pickled[0]}), which can run arbitrary code",
            hint,
        )
    raise EditorError(f"{entry.repo} has no weights of {component}/ as safetensors", hint)


def _require_room(plan: FetchPlan, options: FetchOptions) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = (options.local_dir or options.cache_dir or Path(HF_HUB_CACHE)).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if plan.missing_bytes * _MARGIN > free:
        raise EditorError(
            f"{plan.repo} needs {plan.missing_bytes / 1e9:.1f} GB more, but {folder} has {free / 1e9:.1f} GB free",
            "free some space, or choose another disk with --cache-dir or --local-dir",
        )


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def _converting_errors(entry: EditorEntry, *, planning: bool = False) -> Iterator[None]:
    """Convert huggingface_hub's errors to one line each, with a hint.

    planning: nothing is written, so a failure without an answer from the Hub is a failed connection.
    """
    from huggingface_hub import errors

    unreachable = (errors.LocalEntryNotFoundError, errors.DryRunError)
    try:
        yield
    except Exception as error:  # broad, because the transports (httpx, xet) define their own errors
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        answer = _hub_response(error)
        if answer is not None:
            raise _error_for_response(entry, answer) from error
        if isinstance(error, unreachable) or (planning and not isinstance(error, ValueError)):
            raise EditorError(
                f"{entry.repo} cannot be reached: no connection, or offline mode is on",
                f"check the network and HF_HUB_OFFLINE, then {_AGAIN}; or pass a diffusers folder with --weights",
            ) from error
        raise EditorError(f"fetching {entry.repo} failed: {str(error).partition(chr(10))[0]}", _AGAIN) from error


def _hub_response(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the Hub's HTTP error in the chain of causes of an error; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    return error if isinstance(error, HfHubHTTPError) else None


def _error_for_response(entry: EditorEntry, answer: HfHubHTTPError) -> EditorError:
    """Return the error for an HTTP error response."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{entry.repo}"
    if isinstance(answer, errors.GatedRepoError):
        return EditorError(f"{entry.repo} is gated", f"accept its terms at {page}, then `hf auth login`")
    if isinstance(answer, errors.RepositoryNotFoundError):
        return EditorError(
            f"{entry.repo} does not exist or is private",
            "check the name, or log in with `hf auth login`",
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return EditorError(f"{entry.repo} has no such revision", f"see the branches and tags at {page}")
    if answer.response.status_code == 401:
        return EditorError(f"the Hub does not accept the token for {entry.repo}", "log in again with `hf auth login`")
    return EditorError(f"the Hub answered {answer.response.status_code} for {entry.repo}", _AGAIN)

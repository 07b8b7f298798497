"""Download an editor's weights from the Hugging Face Hub: the components that its plugin reads, and nothing else.

huggingface_hub keeps finished files and respects offline mode. This module adds the rest: it selects the components
that are read, rejects pickles, checks the free disk space, compares checksums, and raises one clear error per failure.
`hub_client` waits and tries again, and `hub_failure` names the causes.

The plan resolves a branch or tag to a commit once, and only that commit is downloaded. The cache's reference for the
branch moves after the last file. Planning therefore changes nothing on disk, and editors load the older revision until
the newer one is complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.editors.loading import hub_failure
from imagewam_cli.editors.loading.hub_client import Say, patient_client
from imagewam_cli.editors.loading.hub_failure import AGAIN
from imagewam_cli.errors import EditorError, ImagewamError, UsageError
from imagewam_cli.hookspecs import EditorEntry

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

_WEIGHTS = "*.safetensors"
_READ = (_WEIGHTS, "*.json", "*.txt", "*.jinja", "*.model")
_VARIANTS = ("*.*.safetensors", "*.index.*.json", "*.*.*.index.json")
"""Second copies of the same weights, which diffusers and transformers mark with an arbitrary word (fp16, non_ema):
NAME.WORD.safetensors, in shards NAME.WORD-00001-of-00002.safetensors or NAME-00001-of-00002.WORD.safetensors, with the
index NAME.safetensors.index.WORD.json or NAME.safetensors.WORD.index.json. Names of plain weights have no dot."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BRANCH = "main"
_MARGIN = 1.05
"""Required free space, relative to the size of the files."""


def _silent(line: str) -> None:
    """Say nothing."""


def _unheard(count: int) -> None:
    """Tell nobody about arrived bytes."""


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
    endpoint: str | None = None
    """Address of another Hub; by default `HF_ENDPOINT`, or huggingface.co."""


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
    _require_folder(options)
    options = replace(options, token=_sound_token(options.token))
    with _converting_errors(entry), patient_client(say), _no_bars():
        commit, known = _commit(entry, options)
        listed = _list_files(entry, options, commit)
    wanted = [f for f in listed if _is_requested(f.filename, entry, options)]
    if not options.include:
        for component in entry.components:
            _require_safetensors(entry, component, [f.filename for f in listed])
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
        _require_folder(options, writable=True)
    options = replace(options, token=_sound_token(options.token))
    _require_room(plan, options)
    with _converting_errors(entry), patient_client(say), _no_bars():
        if options.local_dir is None:
            _remove_damaged(entry, options, plan)
        names = [f.name for f in plan.files]
        folder = Path(_download(entry, options, plan.revision, allow=names, on_bytes=on_bytes))
    _require_checksums(folder, plan)
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
            _remove(Path(found))


def _remove(path: Path) -> None:
    """Remove a file of a snapshot, and the file of the Hub's cache that it links to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


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
            with path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file.sha256:
                _remove(path)
                raise EditorError(
                    f"{file.name} arrived damaged: its SHA-256 begins with {found[:12]}, and the Hub's with "
                    f"{file.sha256[:12]}",
                    f"{AGAIN}; if it happens again, a mirror or proxy changes the file",
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
    if revision == commit or (
        note.is_file() and note.read_text(encoding="utf-8") == commit
    ):  # the cache may be read-only
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    fresh.write_text(commit, encoding="utf-8")
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


def _destination(options: FetchOptions) -> tuple[Path, str]:
    """Return the folder of the download, and the option or environment variable that names it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if options.local_dir is not None:
        return options.local_dir.absolute(), "--local-dir"
    if options.cache_dir is not None:
        return options.cache_dir.absolute(), "--cache-dir"
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    return Path(HF_HUB_CACHE).absolute(), next((n for n in names if os.environ.get(n)), "the Hub's cache")


def _existing_parent(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())


def _require_folder(options: FetchOptions, *, writable: bool = False) -> None:
    """Check that the download goes into a folder, and if `writable` that files can be created in it.

    Raises:
        EditorError: it is a file, or cannot be written.
    """
    folder, name = _destination(options)
    path = _existing_parent(folder)
    hint = "choose another folder with --cache-dir or --local-dir"
    if name.isupper():
        hint = f"set {name} to another folder, or choose one with --cache-dir or --local-dir"
    if not path.is_dir():
        raise EditorError(f"{path} is not a folder, but {name} needs one", hint)
    if writable and not os.access(path, os.W_OK | os.X_OK):
        raise EditorError(f"{path} cannot be written ({name})", f"change its permissions, or {hint}")


def _sound_token(token: str | None) -> str | None:
    """Return the token without white space around it; None for none.

    Raises:
        UsageError: the token, or that of the environment, has characters that no token has.
        EditorError: the stored token cannot be read.
    """
    from huggingface_hub import get_token

    given = token is not None
    try:
        found = token if given else get_token()
    except OSError as error:
        raise EditorError(
            f"the token in {error.filename} cannot be read: {(error.strerror or str(error)).lower()}",
            "set HF_HOME to a folder, or pass --token",
        ) from error
    clean = (found or "").strip()
    if not clean.isascii() or not (clean.isprintable() and " " not in clean):
        where = "--token" if given else "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored token"
        raise UsageError(
            f"{where} is not a token: it has white space or characters that no token has",
            "copy the token again from https://huggingface.co/settings/tokens",
        )
    return clean or None if given else None


def _require_room(plan: FetchPlan, options: FetchOptions) -> None:
    folder = _existing_parent(_destination(options)[0])
    free = shutil.disk_usage(folder).free
    if plan.missing_bytes * _MARGIN > free:
        raise EditorError(
            f"{plan.repo} needs {plan.missing_bytes / 1e9:.1f} GB more, but {folder} has {free / 1e9:.1f} GB free",
            "free some space, or choose another disk with --cache-dir or --local-dir",
        )


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


@contextmanager
def _converting_errors(entry: EditorEntry) -> Iterator[None]:
    """Convert huggingface_hub's errors to one line each, with a hint."""
    try:
        yield
    except ImagewamError:
        raise
    except Exception as error:  # broad, because the transports (httpx, xet) define their own errors
        raise _error_for(entry, error) from error


def _error_for(entry: EditorEntry, error: Exception) -> Exception:
    """Return the error for a failure that `hub_client` has not named: an answer of the Hub, the disk, offline mode."""
    from huggingface_hub import constants, errors

    answer = _hub_response(error)
    if answer is not None:
        return _error_for_response(entry, answer)
    causes = list(hub_failure.chain(error))
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        names = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(n)]
        variable = next(iter(names), "HF_HUB_OFFLINE")
        return EditorError(f"{entry.repo} cannot be reached: offline mode is on ({variable})", f"unset {variable}")
    disk = next((c for c in causes if isinstance(c, OSError) and c.errno is not None and c.filename), None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    if disk is not None:
        return EditorError(
            f"{disk.filename}: {(disk.strerror or str(disk)).lower()}",
            "choose another folder with --cache-dir or --local-dir",
        )
    broken = next((c for c in causes if hub_failure.is_transport(c)), None)
    if broken is not None:
        url = getattr(getattr(broken, "_request", None), "url", f"//{entry.repo}")
        return hub_failure.failure_of(broken, url, constants.HF_HUB_DOWNLOAD_TIMEOUT).error()
    said = hub_failure.first_line(error)
    if "consistency check" in said.lower():
        return EditorError(f"fetching {entry.repo} failed: a file arrived with the wrong size", AGAIN)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.DryRunError):
        return EditorError(f"{entry.repo} cannot be read: {hub_failure.first_line(causes[-1])}", AGAIN)
    return EditorError(
        f"fetching {entry.repo} failed: {said}", f"{AGAIN}; HF_HUB_DISABLE_XET=1 downloads by plain HTTP"
    )


def _hub_response(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the Hub's HTTP error in the chain of causes of an error; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    found = (e for e in hub_failure.chain(error) if isinstance(e, HfHubHTTPError) and hub_failure.status_of(e))
    return next(found, None)


def _error_for_response(entry: EditorEntry, answer: HfHubHTTPError) -> EditorError:
    """Return the error for an HTTP error response."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{entry.repo}"
    status = answer.response.status_code
    login = "log in with `hf auth login`"
    if os.environ.get("HF_TOKEN"):
        login = "correct or unset HF_TOKEN, which is used before the token of `hf auth login`"
    if isinstance(answer, errors.GatedRepoError):
        return EditorError(f"{entry.repo} is gated", f"accept its terms at {page}, then {login}")
    if isinstance(answer, errors.RepositoryNotFoundError):
        return EditorError(f"{entry.repo} does not exist or is private", f"check the name, or {login}")
    if isinstance(answer, errors.RevisionNotFoundError):
        return EditorError(f"{entry.repo} has no such revision", f"see the branches and tags at {page}")
    if isinstance(answer, errors.EntryNotFoundError):
        name = str(answer.response.url).partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        return EditorError(f"{entry.repo} has no file {name}".rstrip(), f"see its files at {page}/tree/main")
    if status == 401:
        return EditorError(f"the Hub does not accept the token for {entry.repo}", login)
    if status == 403:
        said = answer.server_message or answer.response.headers.get("X-Error-Message") or "403"
        return EditorError(
            f"the Hub refuses {entry.repo}: {hub_failure.first_line(said)}",
            f"give the token access to it (public gated repositories too), or {login}; see {page}",
        )
    return EditorError(f"the Hub answered {status} for {entry.repo}", AGAIN)

"""Convert the errors of a download to one line each, with a hint.

`hub_failure` names failures of the connection; this module adds the Hub's answers, the disk and offline mode.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from imagewam_cli.editors.loading import hub_failure
from imagewam_cli.editors.loading.hub_failure import AGAIN
from imagewam_cli.errors import EditorError, ImagewamError
from imagewam_cli.hookspecs import EditorEntry

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@contextmanager
def converting_errors(entry: EditorEntry) -> Iterator[None]:
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

"""The HTTP client of huggingface_hub while imagewam downloads: it waits a stated time, and says when it tries again.

huggingface_hub itself waits without a word, in some requests without an end. Here every request ends after `TRIES`
attempts, a broken file continues where it broke, and the last failure is an `EditorError` that names the cause.
huggingface_hub repeats only httpx's own errors, so an `EditorError` ends a download at once.

The client is the one that huggingface_hub makes (httpx in its older versions, httpx2 in newer ones), so its settings of
proxies and certificates apply.
"""

from __future__ import annotations

import email.utils
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from imagewam_cli.editors.loading.hub_failure import (
    Failure,
    changed_failure,
    client_error,
    failure_of,
    server_failure,
    web_page_failure,
)
from imagewam_cli.errors import EditorError

TRIES = 4
"""Attempts of one request."""
CONTINUATIONS = 8
"""Attempts to continue one file without receiving a byte."""
WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
"""Seconds between the attempts."""
LONGEST_WAIT = 330.0
"""Longest wait in seconds that a server may ask for; the Hub counts requests in windows of 5 minutes."""

Say = Callable[[str], None]


@contextmanager
def patient_client(say: Say) -> Iterator[None]:
    """Use the patient client for all requests of huggingface_hub. say: prints one line for every further attempt."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    former = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    patience = _Patience(say)

    def make() -> Any:
        try:
            return patience.given_to(former())
        except (ImportError, OSError, ValueError, patience.httpx.InvalidURL) as error:
            raise client_error(error) from error

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(former)


class _Patience:
    """Attempts of all requests. After one request has failed for good, no other one is tried."""

    def __init__(self, say: Say) -> None:
        from huggingface_hub import constants, errors

        base: Any = errors.HfHubHTTPError.__bases__[0]
        self.httpx: Any = importlib.import_module(base.__module__.partition(".")[0])
        self.say = say
        self.seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        """Default wait for an answer, for requests for which huggingface_hub gives none."""
        self._answered = False
        self._lost: EditorError | None = None
        self._said = threading.Lock()

    def given_to(self, client: Any) -> Any:
        """Return a client of huggingface_hub, made patient."""
        plain, patience = client.send, self

        def send(request: Any, *, stream: bool = False, **options: Any) -> Any:
            return patience.send(plain, request, stream=stream, **options)

        client.send = send
        return client

    def send(self, plain: Callable[..., Any], request: Any, *, stream: bool, **options: Any) -> Any:
        """Send a request and return its response; read its body unless the caller streams it."""
        self._limit(request)
        path = urlsplit(str(request.url)).path
        if path.startswith("/api/") and not path.startswith("/api/models/"):  # telemetry: no download depends on it
            return plain(request, stream=stream, **options)
        response = self._answer(plain, request, **options)
        response.stream = self._unbroken(plain, request, response, options)
        if not stream:
            response.read()
        return response

    def _answer(self, plain: Callable[..., Any], request: Any, **options: Any) -> Any:
        """Return the first answer that is no failure, with its body unread."""
        for attempt in range(1, TRIES + 1):
            if self._lost is not None:
                raise self._lost
            try:
                response = plain(request, stream=True, **options)
                failure = self._failure_of_answer(response)
                if failure is None:
                    self._answered = True
                    return response
                response.close()
            except self.httpx.TransportError as error:
                failure = failure_of(error, request.url, self._waited(request))
                if not failure.passing or (failure.unreachable and not self._answered):
                    raise self._given_up(failure) from error
            self.wait(failure, attempt, TRIES)
        raise AssertionError  # `wait` raises after the last attempt

    def wait(self, failure: Failure, attempt: int, tries: int, what: str = "trying again") -> None:
        """Say that the next attempt follows and wait for it; raise the failure after the last one."""
        seconds = WAITS[min(attempt, len(WAITS)) - 1] if failure.wait is None else failure.wait
        if attempt >= tries or seconds > LONGEST_WAIT:
            raise self._given_up(failure)
        pause = f" in {seconds:.0f} s" if failure.wait is not None else ""
        with self._said:
            self.say(f"{failure.message}; {what}{pause} ({attempt + 1} of {tries})")
        time.sleep(seconds)

    def _given_up(self, failure: Failure) -> EditorError:
        self._lost = failure.error()
        return self._lost

    def _limit(self, request: Any) -> None:
        """Give the request a time limit if it has none."""
        limits = request.extensions.get("timeout") or {}
        names = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {n: limits.get(n) or self.seconds for n in names}

    def _waited(self, request: Any) -> float:
        return float(request.extensions["timeout"]["read"])

    def _failure_of_answer(self, response: Any) -> Failure | None:
        """Return the failure that an answer stands for, unless huggingface_hub has an own error for it."""
        status, url = response.status_code, response.request.url
        if status == 407 or status == 408 or status == 429 or status >= 500:
            return server_failure(status, url, _asked_wait(response.headers))
        page = str(response.headers.get("content-type", "")).startswith("text/html")
        if status == 200 and page and not urlsplit(str(url)).path.endswith((".html", ".htm")):
            raise self._given_up(web_page_failure(url))
        return None

    def _unbroken(self, plain: Callable[..., Any], request: Any, response: Any, options: dict[str, Any]) -> Any:
        """Return the body of a response, continued with further requests where the connection breaks."""
        patience, httpx = self, self.httpx

        class Unbroken(httpx.SyncByteStream):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.parts = response.stream
                self.at = 0

            def __iter__(self) -> Iterator[bytes]:
                failures = 0
                while True:
                    try:
                        for part in self.parts:
                            self.at, failures = self.at + len(part), 0
                            yield part
                        return
                    except httpx.TransportError as error:
                        failures += 1
                        failure = failure_of(error, request.url, patience._waited(request))
                        if not _can_continue(request, response):
                            raise
                        where = f"continuing at {self.at / 1e6:.1f} MB"
                        patience.wait(failure, failures, CONTINUATIONS, where)
                        self.parts.close()
                        self.parts = patience._rest(plain, request, response, self.at, options)

            def close(self) -> None:
                self.parts.close()

        return Unbroken()

    def _rest(self, plain: Callable[..., Any], request: Any, first: Any, at: int, options: dict[str, Any]) -> Any:
        """Return the body of a response from byte `at` on; a server that knows no ranges sends all of it again.

        Raises:
            EditorError: the server sends another file.
        """
        start, stop = _range(request)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "range"}
        if start + at:
            headers["Range"] = f"bytes={start + at}-{stop}"
        again = self.httpx.Request(request.method, request.url, headers=headers, extensions=request.extensions)
        response = self._answer(plain, again, **options)
        if response.status_code not in (200, 206) or response.headers.get("etag") != first.headers.get("etag"):
            response.close()
            raise self._given_up(changed_failure(request.url))
        return response.stream if response.status_code == 206 else _Without(response.stream, start + at)


class _Without:
    """The body of a response without its first bytes."""

    def __init__(self, stream: Any, skipped: int) -> None:
        self._stream, self._skipped = stream, skipped

    def __iter__(self) -> Iterator[bytes]:
        left = self._skipped
        for part in self._stream:
            if len(part) > left:
                yield part[left:]
            left = max(0, left - len(part))

    def close(self) -> None:
        self._stream.close()


def _can_continue(request: Any, response: Any) -> bool:
    plain = response.headers.get("content-encoding", "identity") == "identity"
    return request.method == "GET" and plain and response.status_code in (200, 206)


def _range(request: Any) -> tuple[int, str]:
    """Return first and last byte of a request's range; the last one may be open."""
    start, _, stop = request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
    return int(start or 0), stop


def _asked_wait(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait: `Retry-After` as seconds or a date, or the Hub's `RateLimit`."""
    for field in str(headers.get("ratelimit", "")).split(";"):
        name, _, value = field.strip().partition("=")
        if name == "t" and value.isdigit():
            return float(value) + 1
    text = str(headers.get("retry-after", "")).strip()
    if text.isdigit():
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())

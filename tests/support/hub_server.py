"""A small Hub server on loopback, with enough of the API for huggingface_hub's own client, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """A repository on the server.

    files: content of the first commit. later: content of the commit `LATER`.
    main: commits that successive requests for the branch main resolve to; the last one repeats.
    cut: path -> number of bytes after which the server closes the connection, once per path.
    answer: status and `X-Error-Code` of every response; None serves the files.
    refusals: status and headers of the next responses, before anything else is served.
    ranges: whether the server can send a part of a file.
    page: serve a web page instead of everything, as the login page of a network does.
    checksums: path -> SHA-256 that the server names; by default that of every file of safetensors.
    sizes: path -> size that the server names, if it is not the true one.
    """

    repo: str
    files: Mapping[str, bytes]
    later: Mapping[str, bytes] = field(default_factory=dict)
    main: list[str] = field(default_factory=lambda: [COMMIT])
    cut: dict[str, int] = field(default_factory=dict)
    answer: tuple[int, str] | None = None
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    ranges: bool = True
    page: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    url: str = ""

    def at(self, commit: str) -> Mapping[str, bytes]:
        return {COMMIT: self.files, LATER: self.later}[commit]

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.main.pop(0) if len(self.main) > 1 else self.main[0]
        return {"v1": COMMIT, COMMIT: COMMIT, LATER: LATER}.get(revision)

    def tree(self, commit: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": self.sizes.get(path, len(content)), "oid": _etag(content)}
            for path, content in self.at(commit).items()
        ]

    def siblings(self, commit: str) -> list[dict[str, object]]:
        return [
            {"rfilename": path, "size": len(content)}
            | ({"lfs": self._lfs(path, content)} if path.endswith(".safetensors") else {})
            for path, content in self.at(commit).items()
        ]

    def _lfs(self, path: str, content: bytes) -> dict[str, object]:
        checksum = self.checksums.get(path, hashlib.sha256(content).hexdigest())
        return {"size": len(content), "sha256": checksum, "pointerSize": 134}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def silent() -> Iterator[str]:
    """Yield the URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def serve(hub: Hub, certificate: tuple[Path, Path] | None = None) -> Iterator[Hub]:
    """Serve the repository in a thread, set `hub.url` and log requests to `hub.log`.

    certificate: PEM files of a certificate for localhost and its key, to serve by https.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_CONNECT(self) -> None:
            self._send(*(hub.answer or (405,))[:1], b"", {}, body=False)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range", "")
            hub.log.append(f"{self.command} {path}{' ' + wanted if wanted else ''}")
            if hub.refusals:
                status, headers = hub.refusals.pop(0)
                self._send(status, b"{}", headers, body)
            elif hub.page:
                self._send(200, b"<html>log in</html>", {"Content-Type": "text/html"}, body)
            elif hub.answer is not None:
                self._send(hub.answer[0], b"{}", {"X-Error-Code": hub.answer[1]}, body)
            elif path.startswith(f"/api/models/{hub.repo}/tree/"):
                self._json(hub.tree(path.rpartition("/")[2]), body)
            elif path == f"/api/models/{hub.repo}" or path.startswith(f"/api/models/{hub.repo}/revision/"):
                self._info(path.partition("/revision/")[2] or "main", body)
            elif path.startswith(f"/{hub.repo}/resolve/"):
                self._file(*path.split("/", 5)[4:], wanted, body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def _info(self, revision: str, body: bool) -> None:
            commit = hub.resolve(revision)
            if commit is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            self._json({"id": hub.repo, "sha": commit, "siblings": hub.siblings(commit)}, body)

        def _json(self, values: object, body: bool) -> None:
            self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"}, body)

        def _file(self, revision: str, name: str, wanted: str, body: bool) -> None:
            commit = hub.resolve(revision) or ""
            content = hub.at(commit)[name]
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and hub.ranges else 0
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if name in hub.sizes:
                headers["X-Linked-Size"] = str(hub.sizes[name])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(
                206 if start else 200, content[start:], headers, body, cut=hub.cut.pop(name, None) if body else None
            )

        def _send(
            self, status: int, content: bytes, headers: Mapping[str, str], body: bool, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            if status == 407:
                self.send_header("Proxy-Authenticate", "Basic")
            self.end_headers()
            if body:
                self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        hub.url = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

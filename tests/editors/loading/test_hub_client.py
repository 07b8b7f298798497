"""Fetch from servers that are silent, break, refuse, or are not the Hub: real sockets, TLS and huggingface_hub."""

from __future__ import annotations

import datetime
import os
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from imagewam_cli.editors.loading import hub_client
from imagewam_cli.editors.loading.hub import fetch, plan_fetch
from imagewam_cli.editors.loading.hub_cache import find_snapshot
from imagewam_cli.editors.loading.hub_options import FetchOptions
from imagewam_cli.errors import EditorError, ImagewamError, UsageError
from imagewam_cli.registry import Registry
from tests.support.hub_server import COMMIT, LATER, Hub, serve, silent

EDITOR, REPO = "instruct-pix2pix", "timbrooks/instruct-pix2pix"
WEIGHTS = "unet/model.safetensors"
ENTRY = Registry.installed().editors.get(EDITOR)


def repository(weights: bytes = b"weights") -> dict[str, bytes]:
    files = {"model_index.json": b"{}", "tokenizer/vocab.json": b"{}", "scheduler/scheduler_config.json": b"{}"}
    for part in ("unet", "vae", "text_encoder"):
        files |= {f"{part}/config.json": b"{}", f"{part}/model.safetensors": part.encode()}
    return files | {WEIGHTS: weights}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no own certificates, an own cache, and no pauses."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_client, "WAITS", (0.0,))


def attempt(url: str, **more: object) -> tuple[str, str, list[str]]:
    """Fetch. Return the error and its hint ("" if it succeeds), and what was said."""
    said: list[str] = []
    options = FetchOptions(endpoint=url, max_workers=1, **more)  # type: ignore[arg-type]
    try:
        fetch(ENTRY, options, plan_fetch(ENTRY, options, say=said.append), say=said.append)
    except ImagewamError as error:
        return error.message, error.hint or "", said
    return "", "", said


def fetched(name: str = WEIGHTS) -> bytes:
    return (find_snapshot(ENTRY) / name).read_bytes()


def test_a_server_that_never_answers_is_given_up_after_four_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with silent() as url:
        error, hint, said = attempt(url)
    host = url.removeprefix("http://")
    assert error == f"no answer from {host} for 0.2 s"
    assert said == [f"no answer from {host} for 0.2 s; trying again ({n} of 4)" for n in (2, 3, 4)]
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in hint


def test_a_file_continues_where_the_connection_broke() -> None:
    content = os.urandom(300_000)
    hub = Hub(REPO, repository(content), cut={WEIGHTS: 100_000})
    with serve(hub):
        error, _, said = attempt(hub.url)
    assert error == ""
    assert fetched() == content
    assert said == [f"{hub.url.removeprefix('http://')} closed the connection; continuing at 0.1 MB (2 of 8)"]
    assert [line for line in hub.log if line.startswith("GET") and WEIGHTS in line] == [
        f"GET /{REPO}/resolve/{COMMIT}/{WEIGHTS}",
        f"GET /{REPO}/resolve/{COMMIT}/{WEIGHTS} bytes=100000-",
    ]


def test_a_server_without_ranges_sends_the_file_again() -> None:
    content = os.urandom(300_000)
    hub = Hub(REPO, repository(content), cut={WEIGHTS: 100_000}, ranges=False)
    with serve(hub):
        error, _, said = attempt(hub.url)
    assert error == ""
    assert fetched() == content
    assert len(said) == 1


class EveryTime(dict[str, int]):
    """Cuts that also happen at every later request."""

    def pop(self, key: str, default: int | None = None) -> int | None:  # type: ignore[override]
        return self.get(key, default)


def test_a_failed_fetch_keeps_the_older_revision_and_complete_files() -> None:
    hub = Hub(REPO, repository(), later=repository(b"trained further"))
    with serve(hub):
        assert attempt(hub.url)[0] == ""
        hub.main, hub.cut = [LATER], EveryTime({WEIGHTS: 0})
        error, hint, said = attempt(hub.url)
        assert error == f"{hub.url.removeprefix('http://')} closed the connection"
        assert "complete files are kept" in hint
        assert len(said) == hub_client.CONTINUATIONS - 1
        assert fetched() == b"weights"
        hub.cut = {}
        hub.log.clear()
        assert attempt(hub.url)[0] == ""
    assert fetched() == b"trained further"
    assert [line for line in hub.log if line.startswith("GET") and "text_encoder/model" in line] == []


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_server_with_a_problem_is_asked_again(status: int) -> None:
    hub = Hub(REPO, repository(), refusals=[(status, {})] * 2)
    with serve(hub):
        host = hub.url.removeprefix("http://")
        error, _, said = attempt(hub.url)
        assert error == ""
        assert said == [f"{host} answered {status}; trying again ({n} of 4)" for n in (2, 3)]
        hub.refusals = [(status, {})] * 4
        error, hint, _ = attempt(hub.url)
    assert error == f"{host} answered {status}"
    assert "run the same command again" in hint


def date_in(seconds: float) -> str:
    return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "0"}, "0 s"),
        ({"Retry-After": date_in(-5)}, "0 s"),
        ({"RateLimit": '"api";r=0;t=0'}, "1 s"),
    ],
)
def test_too_many_requests_wait_as_long_as_the_server_says(headers: dict[str, str], wait: str) -> None:
    hub = Hub(REPO, repository(), refusals=[(429, headers)])
    with serve(hub):
        error, _, said = attempt(hub.url)
    assert error == ""
    assert said == [
        f"{hub.url.removeprefix('http://')} answers no more requests for {wait} (429: too many); "
        f"trying again in {wait} (2 of 4)"
    ]


def test_a_long_wait_is_an_error_that_names_it() -> None:
    hub = Hub(REPO, repository(), refusals=[(429, {"Retry-After": "3600"})])
    with serve(hub):
        error, hint, said = attempt(hub.url)
    assert error.endswith("answers no more requests for 60 min (429: too many)")
    assert "hf auth login" in hint
    assert said == []


def test_a_login_page_is_named() -> None:
    hub = Hub(REPO, repository(), page=True)
    with serve(hub):
        error, hint, _ = attempt(hub.url)
    assert error.endswith("answered with a web page, as the login page of a network or proxy does")
    assert "browser" in hint


def test_a_file_with_another_checksum_is_refused_and_fetched_again() -> None:
    hub = Hub(REPO, repository(), checksums={WEIGHTS: "0" * 64})
    with serve(hub):
        error, hint, _ = attempt(hub.url)
        assert error.startswith(f"{WEIGHTS} arrived damaged: its SHA-256 begins with ")
        assert error.endswith("and the Hub's with 000000000000")
        assert "a mirror or proxy changes the file" in hint
        hub.checksums = {}
        assert attempt(hub.url)[0] == ""
    assert fetched() == b"weights"


def test_a_file_of_the_wrong_size_is_refused() -> None:
    hub = Hub(REPO, repository(), sizes={WEIGHTS: 5})
    with serve(hub):
        error, hint, _ = attempt(hub.url)
    assert error == f"fetching {REPO} failed: a file arrived with the wrong size"
    assert "run the same command again" in hint


def test_a_file_that_was_cut_on_disk_is_fetched_again() -> None:
    hub = Hub(REPO, repository())
    with serve(hub):
        assert attempt(hub.url)[0] == ""
        (find_snapshot(ENTRY) / WEIGHTS).write_bytes(b"wei")
        hub.log.clear()
        assert attempt(hub.url)[0] == ""
    assert fetched() == b"weights"
    assert len([line for line in hub.log if line.startswith("GET") and "/resolve/" in line]) == 1


def certificate(folder: Path, name: str = "localhost", days: tuple[int, int] = (-1, 1)) -> tuple[Path, Path]:
    """Write a self-signed certificate that is valid for these days from now, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.mark.parametrize(
    ("name", "days", "trusted", "reason", "hint"),
    [
        ("localhost", (-1, 1), False, "self-signed", "set SSL_CERT_FILE to the PEM file"),
        ("localhost", (-9, -1), True, "expired", "check the clock"),
        ("localhost", (1, 9), True, "not valid yet", "check the clock"),
        ("elsewhere", (-1, 1), True, "Hostname mismatch", "another server answers under this name"),
    ],
)
def test_a_certificate_is_refused_by_its_cause(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    days: tuple[int, int],
    trusted: bool,
    reason: str,
    hint: str,
) -> None:
    files = certificate(tmp_path, name, days)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
    hub = Hub(REPO, repository())
    with serve(hub, files):
        error, advice, said = attempt(hub.url)
    assert error.startswith(f"the certificate of {hub.url.removeprefix('https://')} is not accepted: {reason}")
    assert hint in advice
    assert said == [], "a certificate does not change between two attempts"


def test_the_hint_on_certificates_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(files[0]))
    hub = Hub(REPO, repository())
    with serve(hub, files):
        _, hint, _ = attempt(hub.url)
        assert hint == f"huggingface_hub does not read REQUESTS_CA_BUNDLE: set SSL_CERT_FILE={files[0]}"
        monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
        assert attempt(hub.url)[0] == ""


def test_missing_files_of_certificates_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    error, hint, _ = attempt("https://localhost:1")
    assert error == "the certificates of SSL_CERT_FILE=/nowhere.pem cannot be read: No such file or directory"
    assert "unset it" in hint


def test_plain_http_behind_https_is_named() -> None:
    with serve(Hub(REPO, repository())) as hub:
        error, hint, _ = attempt(hub.url.replace("http://", "https://"))
    assert "does not answer in TLS" in error
    assert "HF_ENDPOINT" in hint


@pytest.fixture
def closed_port() -> int:
    with silent() as url:
        return int(url.rpartition(":")[2])


def test_a_connection_that_fails_is_named_by_its_cause(closed_port: int) -> None:
    assert attempt(f"http://127.0.0.1:{closed_port}")[0] == f"127.0.0.1:{closed_port} refuses the connection"
    error, hint, _ = attempt("http://hub.invalid")
    assert error == "hub.invalid cannot be found (DNS)"
    assert "HF_ENDPOINT" in hint


def test_a_proxy_is_named_when_it_is_the_cause(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{closed_port}")
    error, hint, _ = attempt("https://hub.invalid")
    assert error == f"the proxy 127.0.0.1:{closed_port} (HTTPS_PROXY) refuses the connection"
    assert "secret" not in hint
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:80")
    assert attempt("https://hub.invalid")[0].startswith("the proxy proxy.invalid:80 (HTTPS_PROXY)")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with serve(Hub(REPO, {}, answer=(407, ""))) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.url)
        error, hint, _ = attempt(f"{scheme}://hub.invalid")
    address = proxy.url.removeprefix("http://")
    assert error == f"the proxy {address} ({scheme.upper()}_PROXY) wants a user name and a password (407)"
    assert hint == f"set {scheme.upper()}_PROXY=http://USER:PASSWORD@HOST:PORT"


def test_a_socks_proxy_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    error, hint, _ = attempt("http://hub.invalid")
    assert error == "ALL_PROXY names a SOCKS proxy, for which a package is missing"
    assert "pip install socksio" in hint


@pytest.mark.parametrize("address", ["127.0.0.1:9", "http://proxy:port", "ftp://proxy"])
def test_an_address_that_is_no_proxy_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    error, hint, _ = attempt("http://hub.invalid")
    assert "proxy" in error
    assert "HTTP_PROXY" in error + hint


@pytest.mark.parametrize("address", ["huggingface.co", "", "ftp://huggingface.co", "http://", "http://[", "http://h:x"])
def test_a_malformed_endpoint_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match=r"HF_ENDPOINT=.* is not the address of a server"):
        plan_fetch(ENTRY, FetchOptions())


def test_a_malformed_timeout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "30s")
    with pytest.raises(UsageError, match="HF_HUB_DOWNLOAD_TIMEOUT=30s is not a number of seconds"):
        plan_fetch(ENTRY, FetchOptions())


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_ä"])
def test_a_token_that_is_none_is_refused_before_any_request(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt("http://hub.invalid", token=token)[0].startswith("--token is not a token")
    monkeypatch.setenv("HF_TOKEN", token)
    if "\n" not in token:  # huggingface_hub itself removes line ends from HF_TOKEN
        assert attempt("http://hub.invalid")[0].startswith("HF_TOKEN is not a token")


def test_white_space_around_a_token_is_harmless() -> None:
    with serve(Hub(REPO, repository())) as hub:
        assert attempt(hub.url, token="hf_abc\n")[0] == ""


def test_a_file_in_place_of_a_folder_is_named_by_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for option in ("local_dir", "cache_dir"):
        error, hint, _ = attempt("http://hub.invalid", **{option: file})
        flag = "--" + option.replace("_", "-")
        assert error == f"{file} is not a folder, but {flag} needs one"
        assert hint == "choose another folder with --cache-dir or --local-dir"
    monkeypatch.setenv("HF_HOME", str(file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file / "hub"))
    error, hint, _ = attempt("http://hub.invalid")
    assert error == f"{file} is not a folder, but HF_HOME needs one"
    assert "set HF_HOME to another folder" in hint


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with serve(Hub(REPO, repository())) as hub:
        error, hint, _ = attempt(hub.url, cache_dir=tmp_path)
    assert error == f"{tmp_path} cannot be written (--cache-dir)"
    assert "choose another folder" in hint


def test_all_other_requests_end_with_the_first_failure() -> None:
    """Many files in parallel do not wait one after the other for a server that has gone."""
    hub = Hub(REPO, repository())
    with serve(hub):
        options = FetchOptions(endpoint=hub.url, max_workers=1)
        plan = plan_fetch(ENTRY, options)
        hub.cut = EveryTime(dict.fromkeys(hub.files, 0))
        said: list[str] = []
        with pytest.raises(EditorError, match="closed the connection"):
            fetch(ENTRY, options, plan, say=said.append)
    assert len(said) == hub_client.CONTINUATIONS - 1

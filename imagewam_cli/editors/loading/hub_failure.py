"""Why the Hub cannot be used: each cause in one line, with a hint that names the setting to change.

The causes are found in the chain of an exception, because httpx hides them: DNS, certificates, proxies and refused
connections are all its `ConnectError`.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from imagewam_cli.errors import EditorError, UsageError

AGAIN = "run the same command again: complete files are kept"
_NETWORK = f"check the network, then {AGAIN}"
_SLOW = f"{_NETWORK}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits for 60 s"
_CLOCK = {9: "not valid yet", 10: "expired"}
_SELF_SIGNED, _OTHER_NAME = (18, 19), (62, 64)
"""Numbers of OpenSSL's verification errors."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request failed.

    passing: another attempt may succeed. unreachable: no server was reached at all. wait: seconds that the server asks
    to wait before the next attempt, or None.
    """

    message: str
    hint: str
    passing: bool = False
    unreachable: bool = False
    wait: float | None = None

    def error(self) -> EditorError:
        """Return the failure as an error."""
        return EditorError(self.message, self.hint)


def failure_of(error: BaseException, url: object, seconds: float) -> Failure:
    """Return the failure that an error of httpx stands for. seconds: how long the request waited for an answer."""
    host = host_of(url)
    causes = list(chain(error))
    names = {c.__name__ for cause in causes for c in type(cause).__mro__}
    certificate = next((c for c in causes if isinstance(c, ssl.SSLCertVerificationError)), None)
    if certificate is not None:
        return _certificate_failure(certificate, host)
    proxy = proxy_for(url)
    if "ProxyError" in names:
        return proxy_failure(proxy, str(error))
    if "UnsupportedProtocol" in names or "LocalProtocolError" in names:
        return Failure(message=f"the request to {host} cannot be sent: {first_line(error)}", hint=_NETWORK)
    peer = host if proxy is None else f"the proxy {proxy.address} ({proxy.variable})"
    way = _NETWORK if proxy is None else f"check {proxy.variable}, then {AGAIN}"
    if any(isinstance(c, ssl.SSLError) for c in causes):
        reason = next(getattr(c, "reason", None) or "" for c in causes if isinstance(c, ssl.SSLError))
        return Failure(
            message=f"{peer} does not answer in TLS ({str(reason).replace('_', ' ').lower() or first_line(error)})",
            hint="check that HF_ENDPOINT begins with http:// or https:// as the server does, and the proxy's address",
        )
    if "TimeoutException" in names:
        return Failure(message=f"no answer from {peer} for {seconds:g} s", hint=_SLOW, passing=True)
    if any(isinstance(c, socket.gaierror) for c in causes):
        name = peer if proxy is None else f"{peer}, whose name"
        hint = f"check the network and HF_ENDPOINT, then {AGAIN}" if proxy is None else way
        return Failure(message=f"{name} cannot be found (DNS)", hint=hint, passing=True, unreachable=True)
    number = next((c.errno for c in causes if isinstance(c, OSError) and c.errno), None)
    if number == errno.ECONNREFUSED:
        return Failure(message=f"{peer} refuses the connection", hint=way, passing=True, unreachable=True)
    if number in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return Failure(message=f"there is no route to {peer}", hint=way, passing=True, unreachable=True)
    return Failure(message=f"{peer} closed the connection", hint=way, passing=True)


def server_failure(status: int, url: object, wait: float | None) -> Failure:
    """Return the failure of an answer that says: not now. wait: seconds that the server asks to wait."""
    host = host_of(url)
    if status == 407:
        return proxy_failure(proxy_for(url), "407 Proxy Authentication Required")
    if status == 429:
        how_long = "" if wait is None else f" for {_duration(wait)}"
        return Failure(
            message=f"{host} answers no more requests{how_long} (429: too many)",
            hint=f"wait, then {AGAIN}; the limit is higher with a token (`hf auth login`)",
            passing=True,
            wait=wait,
        )
    return Failure(
        message=f"{host} answered {status}",
        hint=f"the server has a problem; wait, then {AGAIN}",
        passing=True,
        wait=wait,
    )


def web_page_failure(url: object) -> Failure:
    """Return the failure of an answer that is a web page where data was asked for."""
    return Failure(
        message=f"{host_of(url)} answered with a web page, as the login page of a network or proxy does",
        hint="open a web page in a browser to log in to the network; check HF_ENDPOINT and the proxy",
    )


def changed_failure(url: object) -> Failure:
    """Return the failure of a file that cannot continue, because the server now sends another one."""
    return Failure(message=f"{host_of(url)} sends another file after the connection broke", hint=AGAIN)


def proxy_failure(proxy: Proxy | None, reason: str) -> Failure:
    """Return the failure of a proxy that does not pass the request on."""
    name = "the proxy" if proxy is None else f"the proxy {proxy.address} ({proxy.variable})"
    variable = "HTTPS_PROXY" if proxy is None else proxy.variable
    if "407" in reason:
        return Failure(
            message=f"{name} wants a user name and a password (407)",
            hint=f"set {variable}=http://USER:PASSWORD@HOST:PORT",
        )
    return Failure(message=f"{name} does not pass the request on: {reason}", hint=f"check {variable}")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy that the environment names. variable: the environment variable; address: HOST:PORT, without secrets."""

    variable: str
    address: str


def proxy_for(url: object) -> Proxy | None:
    """Return the proxy through which a URL is reached, or None."""
    parts = urlsplit(str(url))
    proxies = getproxies_environment()
    if proxy_bypass(parts.netloc):
        return None
    for kind in (parts.scheme, "all"):
        if proxies.get(kind):
            names = (f"{kind}_proxy", f"{kind.upper()}_PROXY")
            return Proxy(
                variable=next((n for n in names if os.environ.get(n)), names[1]),
                address=urlsplit(proxies[kind]).netloc.rpartition("@")[2] or proxies[kind],
            )
    return None


def client_error(error: Exception) -> EditorError:
    """Return the error for a client that cannot be made: a proxy's package or address, or a file of certificates."""
    variables = {n: v for n, v in os.environ.items() if n.lower().endswith("_proxy") and n.lower() != "no_proxy" and v}
    if isinstance(error, ImportError):
        socks = next((n for n, v in variables.items() if v.lower().startswith("socks")), "ALL_PROXY")
        return EditorError(
            f"{socks} names a SOCKS proxy, for which a package is missing", f"pip install socksio, or unset {socks}"
        )
    if isinstance(error, OSError):
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        return EditorError(
            f"the certificates of {name}={os.environ.get(name, '')} cannot be read: {error.strerror or error}",
            f"set {name} to a PEM file of certificate authorities, or unset it",
        )
    named = ", ".join(sorted(variables)) or "HTTPS_PROXY"
    return EditorError(
        f"the proxy of the environment cannot be used: {first_line(error)}", f"correct {named}: http://HOST:PORT"
    )


def require_sound_settings() -> None:
    """Check the environment variables that huggingface_hub reads when it is imported, before it is.

    Raises:
        UsageError: a variable has a value that huggingface_hub cannot use.
    """
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if "HF_ENDPOINT" in os.environ and not sound:
        raise UsageError(
            f"HF_ENDPOINT={address} is not the address of a server",
            "write it as https://huggingface.co, or unset it",
        )
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        if os.environ.get(name) and not os.environ[name].isdigit():
            raise UsageError(f"{name}={os.environ[name]} is not a number of seconds", "write it as 30, or unset it")


def host_of(url: object) -> str:
    """Return HOST or HOST:PORT of a URL."""
    return urlsplit(str(url)).netloc.rpartition("@")[2] or str(url)


def first_line(error: object) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _certificate_failure(error: ssl.SSLCertVerificationError, host: str) -> Failure:
    code = error.verify_code
    own = os.environ.get("SSL_CERT_FILE")
    if code in _CLOCK:
        hint = f"check the clock of this machine; if it is right, ask those who run {host} for a valid certificate"
    elif code in _OTHER_NAME:
        hint = "check HF_ENDPOINT and the proxy: another server answers under this name"
    elif own:
        hint = f"add the certificate authority of your network to SSL_CERT_FILE={own}"
    elif os.environ.get("REQUESTS_CA_BUNDLE"):
        hint = f"huggingface_hub does not read REQUESTS_CA_BUNDLE: set SSL_CERT_FILE={os.environ['REQUESTS_CA_BUNDLE']}"
    else:
        hint = "set SSL_CERT_FILE to the PEM file with the certificate authority of your network or mirror"
    reason = _CLOCK.get(code) or ("self-signed" if code in _SELF_SIGNED else error.verify_message)
    return Failure(message=f"the certificate of {host} is not accepted: {reason}", hint=hint)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def is_transport(error: BaseException) -> bool:
    """Return whether an error is httpx's for a connection that failed."""
    return any(c.__name__ == "TransportError" for c in type(error).__mro__)


def status_of(error: Any) -> int | None:
    """Return the HTTP status of an error's response, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)

"""Fetch one picture from a public web address, within limits of size, time and reach.

Used only where the caller allowed URLs. The threat is a request forged through us (SSRF): a URL, a
redirect or a DNS answer that leads to the local network or to a cloud's metadata service.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from diptych.errors import BadImage

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["fetch", "shown_url"]

_MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK_BYTES = 1 << 16
_URL_PUNCTUATION = "/%:@!$&'()*+,;=~-._"


def fetch(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body behind an http(s) URL.

    At most `max_bytes` are read, and `timeout_s` seconds bound the whole of it: name look-up,
    connection, redirects (at most 3, never from https to http) and body. Every address a host name
    stands for must be on the public internet, and the connection goes to an address that was
    checked. Proxies of the environment are not used: they would resolve the name a second time.
    Raises `BadImage` with the URL, without its query, and the reason.
    """
    name = shown_url(url)
    deadline = time.monotonic() + timeout_s
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            answer = _get(_parse(url), deadline, max_bytes)
            if isinstance(answer, bytes):
                return answer
            url = _next_url(url, answer.location)
        raise _Refused(f"redirects more than {_MAX_REDIRECTS} times")
    except _Refused as error:
        raise BadImage(name, str(error)) from None
    except TimeoutError as error:
        raise BadImage(name, f"did not arrive within {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        detail = " ".join(str(error).split())[:160] or type(error).__name__
        raise BadImage(name, f"cannot be fetched ({detail})") from error


def shown_url(url: str) -> str:
    """Return a URL fit for messages and logs: no password, no query, at most 200 characters."""
    head, question_mark, _ = url.partition("#")[0].partition("?")
    scheme, separator, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
    shown += "?…" if question_mark else ""
    return shown if len(shown) <= 200 else shown[:199] + "…"


class _Refused(Exception):
    """Carry a reason up to `fetch`, which knows the URL the user gave."""


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


@dataclass(frozen=True, slots=True)
class _Target:
    secure: bool
    host: str
    port: int
    path: str
    host_header: str


def _parse(url: str) -> _Target:
    parts: SplitResult = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Refused(f"leads to a {parts.scheme or 'nameless'}: address; only http(s) is fetched")
    if parts.username is not None or parts.password is not None:
        raise _Refused("carries a user name or password; that is not supported")
    if not parts.hostname:
        raise _Refused("names no host")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe=_URL_PUNCTUATION)
    if parts.query:
        path += "?" + quote(parts.query, safe=_URL_PUNCTUATION + "?")
    header = f"[{host}]" if ":" in host else host
    if parts.port is not None:
        header += f":{parts.port}"
    return _Target(secure, host, parts.port or (443 if secure else 80), path, header)


def _next_url(url: str, location: str) -> str:
    following = urljoin(url, location)
    if url.lower().startswith("https:") and not following.lower().startswith("https:"):
        raise _Refused("redirects from https to an insecure address")
    return following


def _get(target: _Target, deadline: float, max_bytes: int) -> bytes | _Redirect:
    """Send one request over a checked connection; return the body or where to go next."""
    with _connected(target, deadline) as raw:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _DeadlineSocket(raw, deadline)
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        for header, value in (
            ("Host", target.host_header),
            ("User-Agent", "diptych"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ):
            connection.putheader(header, value)
        connection.endheaders()
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return _Redirect(location)
        if response.status != 200:
            raise _Refused(f"the server answered {response.status} {response.reason[:60]}".strip())
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise _Refused("the server sent it compressed although asked not to")
        return _body(response, max_bytes)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    too_large = _Refused(f"is larger than {max_bytes:,} bytes")
    if response.length is not None and response.length > max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    # `read(n)` returns short instead of raising when the server hangs up early.
    if response.length:
        raise _Refused("ended before it was complete")
    return bytes(body)


@contextlib.contextmanager
def _connected(target: _Target, deadline: float) -> Iterator[socket.socket]:
    """Yield a socket to a public address of the host, inside TLS where the URL asks for it."""
    raw = _connect(_public_addresses(target, deadline), deadline)
    try:
        if target.secure:
            raw.settimeout(_left(deadline))
            raw = _tls_context().wrap_socket(raw, server_hostname=target.host)
        yield raw
    finally:
        raw.close()


def _public_addresses(target: _Target, deadline: float) -> list[tuple[Any, ...]]:
    """Resolve the host once; return its addresses if all of them are public."""
    addresses = _resolve(target.host, target.port, deadline)
    # One private answer among public ones is how rebinding attacks begin: refuse them all.
    if not addresses or not all(_is_public(str(entry[4][0])) for entry in addresses):
        raise _Refused(f"'{target.host}' is not on the public internet")
    return addresses


def _resolve(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """Look a host up; in a thread, because getaddrinfo knows no time limit."""
    answers: list[list[tuple[Any, ...]] | Exception] = []

    def look_up() -> None:
        try:
            answers.append(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if not answers:
        raise TimeoutError
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


# Only these are handed out; the rest of IPv6 is local, reserved or a translation.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _is_public(address: str) -> bool:
    """Tell whether an IP address, or the IPv4 address it stands for, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inner_ipv4(ip)
        if inner is None and ip not in _GLOBAL_UNICAST:
            return False
        ip = inner or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _inner_ipv4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address stands for (mapped, 6to4, NAT64)."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


def _connect(addresses: list[tuple[Any, ...]], deadline: float) -> socket.socket:
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        raw = socket.socket(family, kind, protocol)
        try:
            # A dead first address (often IPv6) must leave time for the others.
            raw.settimeout(_left(deadline) / (len(addresses) - index))
            raw.connect(address)
        except OSError:
            raw.close()
            if index == len(addresses) - 1:
                raise
        else:
            return raw
    raise OSError("no address to connect to")


def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _DeadlineSocket:
    """Offer http.client a socket whose reads and writes share one deadline.

    A socket's own timeout starts anew with every byte, so a server could drip for ever.
    """

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(_left(self._deadline))
        self._raw.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._raw, self._deadline))

    def close(self) -> None:
        """Leave the socket open: http.client closes it before the body is read."""


class _DeadlineReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(_left(self._deadline))
        return self._raw.recv_into(buffer)

"""Pictures from URLs: limits of size and time, and no way into the local network.

A server of our own on the loopback device plays the internet; `_is_public` is told to let exactly
its address pass, and everything else is judged by the real rule.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych import remote_images
from diptych.errors import BadImage
from diptych.images import ImageLimits, open_image
from diptych.remote_images import fetch, shown_url

HOME = "127.0.0.1"
is_really_public = remote_images._is_public
real_getaddrinfo = socket.getaddrinfo


def numeric_only(host: str, port: int, **words: Any) -> Any:
    """Look up nothing, but read every spelling of an address that the C library reads."""
    return real_getaddrinfo(host, port, **words, flags=socket.AI_NUMERICHOST)


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (7, 5), (1, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


PNG = png()


def answer(body: bytes = PNG, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, f"Location: {location}")


class Server:
    """Sends the bytes a test puts under a path, in pieces with pauses, whatever they are."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, bytes | list[bytes | float]] = {}
        self.requests: list[str] = []
        self._context = context
        self._socket = socket.create_server((HOME, 0))
        self._closing = threading.Event()
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def url(self, path: str = "/", host: str = HOME) -> str:
        return f"http{'s' if self._context else ''}://{host}:{self.port}{path}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                if not (data := connection.recv(4096)):
                    return
                request += data
            self.requests.append(request.decode("ascii"))
            page = self.pages.get(request.split()[1].decode(), answer(b"", "404 Not Found"))
            for piece in [page] if isinstance(page, bytes) else page:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                elif self._closing.wait(piece):
                    return
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._closing.set()
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _a_small_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", numeric_only)
    monkeypatch.setattr(remote_images, "_is_public", lambda ip: ip == HOME or is_really_public(ip))


def resolve_to(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[list[str]]]) -> list[str]:
    """Answer look-ups from lists, the next one each time; return the names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        addresses = answers[host].pop(0)
        return [
            (
                socket.AF_INET6 if ":" in ip else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (ip, port),
            )
            for ip in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_picture_arrives(server: Server) -> None:
    server.pages["/a.png?size=7%20x"] = answer()
    picture = open_image(server.url("/a.png?size=7 x#part"), allow_urls=True)
    assert picture.getpixel((3, 3)) == (1, 2, 3)
    request = server.requests[0]
    assert f"\r\nHost: {HOME}:{server.port}\r\n" in request
    assert "Accept-Encoding: identity" in request
    with pytest.raises(BadImage, match="allow_urls=True"):
        open_image(server.url("/a.png"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "page",
    [
        b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(PNG), PNG),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
        answer(PNG, "200 OK", "Content-Type: text/html"),
        [*(bytes([byte]) for byte in answer())],
        [answer()[:30], 0.05, answer()[30:80], 0.05, answer()[80:]],
    ],
)
def test_ways_to_answer(server: Server, page: Any) -> None:
    server.pages["/"] = page
    assert fetch(server.url(), max_bytes=len(PNG), timeout_s=20) == PNG


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (answer(b"", "404 Not Found"), "the server answered 404 Not Found"),
        (answer(b"", "500 Oh no"), "the server answered 500 Oh no"),
        (answer(b"", "302 Found"), "the server answered 302 Found"),
        (answer(PNG, "206 Partial Content"), "the server answered 206"),
        (answer(PNG, "200 OK", "Content-Encoding: gzip"), "sent it compressed"),
        (answer(b""), "is empty"),
        (answer(b"<html>log in</html>"), "is a web page"),
        (answer()[:-9], "ended before it was complete"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "is empty"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 99_999 + b"\r\n\r\n", "cannot be fetched"),
    ],
)
def test_answers_that_are_no_picture(server: Server, page: bytes, reason: str) -> None:
    server.pages["/a"] = page
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(server.url("/a"), allow_urls=True)
    assert caught.value.name == server.url("/a")


# Size.


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40000000\r\n",
    ],
)
def test_too_large(server: Server, head: bytes) -> None:
    server.pages["/"] = [head, *[bytes(1 << 16)] * 1000]
    started = time.process_time()
    with pytest.raises(BadImage, match=r"is larger than 100,000 bytes"):
        open_image(server.url(), allow_urls=True, limits=ImageLimits(max_bytes=100_000))
    assert time.process_time() - started < 1


# Time.

DRIPS: dict[str, list[bytes | float]] = {
    "silence": [60.0],
    "status line": [piece for byte in b"HTTP/1.1 200 OK" for piece in (bytes([byte]), 0.1)] * 9,
    "headers": [b"HTTP/1.1 200 OK\r\n", *[b"A: b\r\n", 0.1] * 90],
    "one long header": [b"HTTP/1.1 200 OK\r\nA: ", *[b"b", 0.1] * 90],
    "continue": [b"HTTP/1.1 100 Continue\r\n\r\n", 0.1] * 90,
    "body": [answer()[:60], *[b"\0", 0.1] * 90],
    "chunks": [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        *[b"1\r\na\r\n", 0.1] * 90,
    ],
}


@pytest.mark.parametrize("drip", DRIPS.values(), ids=DRIPS)
def test_a_server_that_drips_is_left(server: Server, drip: list[bytes | float]) -> None:
    server.pages["/"] = drip
    started = time.monotonic()
    with pytest.raises(BadImage, match=r"did not arrive within 0\.5 s"):
        open_image(server.url(), allow_urls=True, limits=ImageLimits(timeout_s=0.5))
    # Far less than the 9 s and more of the drip; the rest is for a busy machine.
    assert 0.4 < time.monotonic() - started < 5


def test_redirects_share_one_deadline(server: Server) -> None:
    for hop in range(3):
        server.pages[f"/{hop}"] = [0.3, redirect(f"/{hop + 1}")]
    server.pages["/3"] = [0.3, answer()]
    with pytest.raises(BadImage, match="did not arrive"):
        fetch(server.url("/0"), max_bytes=9999, timeout_s=0.8)


def test_a_slow_name_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: never.wait(60) and [])
    started = time.monotonic()
    with pytest.raises(BadImage, match=r"did not arrive within 0\.3 s"):
        fetch("http://slow.test/", max_bytes=9, timeout_s=0.3)
    assert time.monotonic() - started < 5
    never.set()


def test_a_tls_handshake_that_never_comes(server: Server) -> None:
    server.pages["/"] = [60.0]
    with pytest.raises(BadImage, match="did not arrive"):
        fetch(server.url().replace("http:", "https:"), max_bytes=9, timeout_s=0.5)


# Reach.

PRIVATE = [
    "127.0.0.1",
    "127.8.9.1",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "::8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::1",
    "100::1",
    "4000::1",
    "5f00::1",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_really_public(address)
    monkeypatch.setattr(remote_images, "_is_public", is_really_public)
    resolve_to(monkeypatch, {"evil.test": [[address], ["8.8.8.8", address]]})
    for _ in range(2):
        with pytest.raises(BadImage, match=r"'evil\.test' is not on the public internet"):
            fetch("http://evil.test/", max_bytes=9, timeout_s=5)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_really_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0", "0x7f000002", "2130706434",
     "127.2", "017700000002", "169.254.169.254", "[fe80::1%25lo]", "LOCALHOST.", "①②⑦.0.0.2"],
)  # fmt: skip
def test_hosts_in_disguise(host: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if host.lower().startswith("localhost"):
        resolve_to(monkeypatch, {host.lower(): [["127.0.0.2", "::1"]]})
    with pytest.raises(BadImage, match=r"is not on the public internet|cannot be fetched"):
        fetch(f"http://{host}:{server.port}/", max_bytes=9999, timeout_s=5)
    assert server.requests == []


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 T", "308 P"])
def test_redirects_are_followed(server: Server, status: str) -> None:
    server.pages["/a/b"] = redirect("../c d", status)
    server.pages["/c%20d"] = redirect(server.url("/e"), status)
    server.pages["/e"] = redirect(f"//{HOME}:{server.port}/f", status)
    server.pages["/f"] = answer()
    assert fetch(server.url("/a/b"), max_bytes=9999, timeout_s=20) == PNG
    assert len(server.requests) == 4


def test_redirects_end(server: Server) -> None:
    server.pages["/"] = redirect("/")
    with pytest.raises(BadImage, match="redirects more than 3 times"):
        fetch(server.url(), max_bytes=9999, timeout_s=20)
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2:{port}/", "'127.0.0.2' is not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "'169.254.169.254' is not on the public"),
        ("http://[::1]:{port}/", "'::1' is not on the public"),
        ("http://[::ffff:10.0.0.1]/", "'::ffff:10.0.0.1' is not on the public"),
        ("//10.0.0.1/", "'10.0.0.1' is not on the public"),
        ("file:///etc/passwd", "leads to a file: address"),
        ("ftp://127.0.0.1/", "leads to a ftp: address"),
        ("data:image/png;base64,AAAA", "leads to a data: address"),
        ("http://user:word@127.0.0.1/", "carries a user name or password"),
        ("http://[::1/", "cannot be fetched"),
        ("http://127.0.0.1:99999/", "cannot be fetched"),
    ],
)
def test_redirects_are_judged_anew(server: Server, location: str, reason: str) -> None:
    server.pages["/"] = redirect(location.format(port=server.port))
    server.pages["/second"] = redirect("/")
    for path in ("/", "/second"):
        with pytest.raises(BadImage, match=reason) as caught:
            open_image(server.url(path), allow_urls=True)
        assert caught.value.name == server.url(path)
    assert len(server.requests) == 3


def test_a_name_is_resolved_once_a_hop_and_the_checked_address_is_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second answer is the attack: by then nobody must ask any more.
    asked = resolve_to(monkeypatch, {"rebind.test": [[HOME], ["127.0.0.2"]]})
    server.pages["/"] = answer()
    assert fetch(server.url("/", "rebind.test"), max_bytes=9999, timeout_s=20) == PNG
    assert asked == ["rebind.test"]
    assert f"Host: rebind.test:{server.port}" in server.requests[0]
    with pytest.raises(BadImage, match=r"'rebind\.test' is not on the public internet"):
        fetch(server.url("/", "rebind.test"), max_bytes=9999, timeout_s=20)
    assert len(server.requests) == 1


def test_the_next_address_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "_is_public", lambda _: True)
    resolve_to(monkeypatch, {"two.test": [["127.0.0.3", HOME], ["127.0.0.3"], []]})
    server.pages["/"] = answer()
    assert fetch(server.url("/", "two.test"), max_bytes=9999, timeout_s=20) == PNG
    with pytest.raises(BadImage, match=r"cannot be fetched .*refused"):
        fetch(server.url("/", "two.test"), max_bytes=9999, timeout_s=20)
    with pytest.raises(BadImage, match="not on the public internet"):
        fetch(server.url("/", "two.test"), max_bytes=9999, timeout_s=20)


def test_proxies_of_the_environment_are_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.2:1")
    server.pages["/"] = answer()
    assert fetch(server.url(), max_bytes=9999, timeout_s=20) == PNG


@pytest.mark.parametrize(
    "url",
    ["http://", "http://?", "https://:80/", "http://a b/", "http://a\r\nHost: b/", "http://%00/",
     "http://" + "a" * 300 + ".test/", "http://ä" + "a" * 80 + ".test", "http://[v1.x]/",
     "http://x:y/", "http://x:-1/", "http://@/"],
)  # fmt: skip
def test_nonsense_urls(url: str) -> None:
    with pytest.raises(BadImage) as caught:
        open_image(url, allow_urls=True)
    assert "\n" not in caught.value.reason


def test_a_path_cannot_smuggle_a_header(server: Server) -> None:
    server.pages["/a%0D%0AX:%20y"] = answer()
    target = remote_images._parse(server.url("/"))
    assert "\r" not in remote_images._parse("http://h.test/a\r\nX: y").path
    assert "\r" not in target.host_header
    # Quoted ones stay quoted, in a redirect too.
    server.pages["/"] = redirect("/a%0D%0AX:%20y")
    assert fetch(server.url(), max_bytes=9999, timeout_s=20) == PNG


# TLS. The certificate is for pictures.test, valid 2020 to 2120; the key guards nothing.

KEY = """
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgInloIaLpx5Wpt+brfqvakntJDTmxsdZYlvTKh4fpmS+h
RANCAATb2WkybuUoIupqmhGMNOgWU8urEvh/V9rplfE9Sp60KQ19ZvB37EwZxrsHKjiUhmLo/0ygkjNwYQbIOwigco/Z
"""
CERTIFICATE = """
MIIBfDCCASOgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1waWN0dXJlcy50ZXN0MCAXDTIwMDEwMTAw
MDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYDVQQDDA1waWN0dXJlcy50ZXN0MFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAE29lpMm7lKCLqapoRjDToFlPLqxL4f1fa6ZXxPUqetCkNfWbwd+xMGca7Byo4lIZi6P9MoJIzcGEG
yDsIoHKP2aNcMFowGAYDVR0RBBEwD4INcGljdHVyZXMudGVzdDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBSD
G43zh+prXl7LILY+7dhoMpbpOjAOBgNVHQ8BAf8EBAMCAoQwCgYIKoZIzj0EAwIDRwAwRAIgZECQNaeP5yQ0pbyY
camXWqOKiQLfxyYT+aW13x5AlFoCIHRVN0cN5mpXDxvGUnmIHHbaKGlu3OoAHcozlXafegKy
"""


@pytest.fixture
def secure_server(tmp_path: Path) -> Iterator[Server]:
    certificate = ssl.DER_cert_to_PEM_cert(base64.b64decode(CERTIFICATE))
    kind = "PRIVATE KEY"
    (tmp_path / "both.pem").write_text(
        f"-----BEGIN {kind}-----{KEY}-----END {kind}-----\n{certificate}"
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    server = Server(context)
    server.pages["/"] = answer()
    yield server
    server.close()


def test_tls_checks_the_name_and_the_chain(
    secure_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {name: [[HOME]] * 3 for name in ("pictures.test", "other.test")}
    resolve_to(monkeypatch, names)
    url = secure_server.url("/", "pictures.test")
    with pytest.raises(BadImage, match=r"cannot be fetched .*certificate verify failed"):
        fetch(url, max_bytes=9999, timeout_s=20)
    trusting = ssl.create_default_context(
        cadata=ssl.DER_cert_to_PEM_cert(base64.b64decode(CERTIFICATE))
    )
    monkeypatch.setattr(remote_images, "_tls_context", lambda: trusting)
    assert fetch(url, max_bytes=9999, timeout_s=20) == PNG
    with pytest.raises(BadImage, match="Hostname mismatch"):
        fetch(secure_server.url("/", "other.test"), max_bytes=9999, timeout_s=20)
    secure_server.pages["/"] = redirect(f"http://pictures.test:{secure_server.port}/x")
    with pytest.raises(BadImage, match="redirects from https to an insecure address"):
        fetch(url, max_bytes=9999, timeout_s=20)
    assert len(secure_server.requests) == 2


# Names.


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://a.test/b.png", "http://a.test/b.png"),
        ("https://me:secret@a.test:8/b?token=1#x", "https://a.test:8/b?…"),
        ("http://a.test?token=1/2", "http://a.test?…"),
        ("http://a@b@c.test/d@e", "http://c.test/d@e"),
        ("http://a.test/" + "x" * 300, "http://a.test/" + "x" * 185 + "…"),
    ],
)
def test_messages_keep_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_the_lists_above_are_addresses() -> None:
    for address in PRIVATE + PUBLIC:
        ipaddress.ip_address(address.partition("%")[0])

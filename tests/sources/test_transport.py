"""Proxies, name resolution and connections, under the range reader's feet."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpcore
import httpx
import pytest
import trio
from trio.testing import MockClock

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Mirror
from weightfs.errors import ConfigError, FailureKind, SourceError
from weightfs.sources._client import HttpClient
from weightfs.sources._ranged import RangeReader
from weightfs.sources._stream import Address, BulkBackend, Resolver, is_private
from weightfs.sources._transport import BulkTransport, client_context, proxy_for
from weightfs.sources.base import FetchSettings
from weightfs.testing.origin import Fault, FaultKind, open_origin, refused_url
from weightfs.testing.tls import TlsFiles, make_tls

DATA = hashlib.shake_128(b"z").digest(1_500_000)
PATH = "/m.gguf"
SPAN = ByteSpan(10, 1_400_000)


@dataclass
class Proxy:
    """A forward and CONNECT proxy; `heads` are the requests it got; `refuse` is a status for CONNECT."""

    url: str
    heads: list[str] = field(default_factory=list)
    refuse: str = ""


async def _copy(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await source.receive_some(65536):
            await sink.send_all(data)
    scope.cancel()


@asynccontextmanager
async def open_proxy(tls: TlsFiles | None = None) -> AsyncIterator[Proxy]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    proxy = Proxy(f"{'https' if tls else 'http'}://127.0.0.1:{port}")

    async def handle(plain: trio.SocketStream) -> None:
        client: trio.abc.Stream = plain
        if tls is not None:
            client = trio.SSLStream(plain, tls.server_context(), server_side=True, https_compatible=True)
        head = b""
        while b"\r\n\r\n" not in head:
            head += await client.receive_some(65536)
        proxy.heads.append(head.decode())
        method, target, _ = head.decode().split(" ", 2)
        if proxy.refuse:
            await client.send_all(f"HTTP/1.1 {proxy.refuse} No\r\nContent-Length: 0\r\n\r\n".encode())
            return
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        assert parts.hostname is not None
        origin = await trio.open_tcp_stream(parts.hostname, parts.port or 80)
        if method == "CONNECT":
            await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            lines = [x for x in head.decode().split("\r\n")[1:] if not x.lower().startswith("proxy-")]
            await origin.send_all("\r\n".join([f"{method} {parts.path} HTTP/1.1", *lines]).encode())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, client, origin, nursery.cancel_scope)
            nursery.start_soon(_copy, origin, client, nursery.cancel_scope)
        origin.socket.close()
        plain.socket.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield proxy
        nursery.cancel_scope.cancel()


async def read(url: str, **settings: object) -> bytes:
    client = HttpClient(FetchSettings(**settings))  # type: ignore[arg-type]  # by name
    try:
        async with RangeReader(client).open(Mirror(url), BlobShape.of(len(DATA)), SPAN) as body:
            return b"".join([piece async for piece in body])
    finally:
        await client.aclose()


@pytest.mark.parametrize("secure_proxy", [False, True])
async def test_http_and_https_by_a_proxy(tmp_path: Path, secure_proxy: bool) -> None:
    tls = make_tls(tmp_path)
    async with (
        open_proxy(tls if secure_proxy else None) as proxy,
        open_origin({PATH: DATA}) as plain,
        open_origin({PATH: DATA}, tls=tls) as secure,
    ):
        with_password = proxy.url.replace("://", "://user:p%40ss@")
        for origin in (plain, secure):
            got = await read(origin.url(PATH), proxy=with_password, ca_file=str(tls.ca))
            assert got == DATA[10:1_400_000]
            assert "proxy-authorization" not in origin.seen[0].headers
        forwarded, tunnelled = proxy.heads
        assert forwarded.startswith(f"GET {plain.url(PATH)} HTTP/1.1\r\n")
        assert tunnelled.startswith(f"CONNECT 127.0.0.1:{secure.port} HTTP/1.1\r\n")
        expected = "Proxy-Authorization: Basic " + base64.b64encode(b"user:p@ss").decode()
        assert expected in forwarded
        assert expected in tunnelled


async def test_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_proxy() as proxy, open_origin({PATH: DATA}) as origin:
        monkeypatch.setenv("http_proxy", proxy.url)
        await read(origin.url(PATH))
        assert len(proxy.heads) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await read(origin.url(PATH))
        assert len(proxy.heads) == 1


def test_choice_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    url = httpx.URL("https://h.example/m")
    assert proxy_for(url, None) is None
    assert proxy_for(url, "http://p:1") == "http://p:1"
    monkeypatch.setenv("ALL_PROXY", "http://a:1")
    assert proxy_for(url, None) == "http://a:1"
    monkeypatch.setenv("HTTPS_PROXY", "http://s:1")
    assert proxy_for(url, None) == "http://s:1"
    assert proxy_for(url, "") is None  # told to use none
    monkeypatch.setenv("NO_PROXY", ".example")
    assert proxy_for(url, "http://p:1") is None


async def test_refusing_and_absent_proxies(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    async with open_proxy() as proxy, open_origin({PATH: DATA}, tls=tls) as origin:
        for status, kind in (("407", FailureKind.AUTH), ("502", FailureKind.CONNECT)):
            proxy.refuse = status
            with pytest.raises(SourceError) as caught:
                await read(origin.url(PATH), proxy=proxy.url)
            assert caught.value.kind is kind
        with pytest.raises(SourceError) as caught:
            await read(origin.url(PATH), proxy=refused_url(""))
        assert caught.value.kind is FailureKind.CONNECT
        for bad in ("socks5://h:1", "http://", "http://[", "ftp://h"):
            with pytest.raises(ConfigError):
                await read(origin.url(PATH), proxy=bad)
        with pytest.raises(ConfigError, match="CA bundle"):
            await read(origin.url(PATH), ca_file=str(tmp_path / "none"))


class Names(Resolver):
    def __init__(self, *addresses: str) -> None:
        super().__init__()
        self.asked = 0
        self.found = tuple(ipaddress.ip_address(address) for address in addresses)

    async def look_up(self, host: str) -> tuple[Address, ...]:
        self.asked += 1
        return self.found


class Network(BulkBackend):
    """127.0.0.1 answers, 127.0.0.2 is silent, all else refuses."""

    tried: list[str]

    async def connect_address(self, address: Address, port: int) -> socket.socket:
        self.tried = [*getattr(self, "tried", []), str(address)]
        if str(address) == "127.0.0.2":
            await trio.sleep_forever()
        if str(address) != "127.0.0.1":
            raise ConnectionRefusedError("refused")
        return await super().connect_address(address, port)


async def test_addresses_are_tried_in_turn(autojump_clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin:
        backend = Network(Names("127.0.0.3", "127.0.0.2", "::2", "127.0.0.1"))
        stream = await backend.connect_tcp("name.test", origin.port, 10)
        assert backend.tried == ["127.0.0.3", "::2", "127.0.0.2", "127.0.0.1"]
        await stream.aclose()
        backend = Network(Names("127.0.0.3", "127.0.0.4"))
        with pytest.raises(httpcore.ConnectError, match="refused"):
            await backend.connect_tcp("name.test", origin.port, 10)
        backend = Network(Names("127.0.0.2"))
        with pytest.raises(httpcore.ConnectTimeout):
            await backend.connect_tcp("name.test", origin.port, 10)


class Slow(BulkBackend):
    """Eight seconds until a connection is there."""

    async def connect_address(self, address: Address, port: int) -> socket.socket:
        await trio.sleep(8)
        return await super().connect_address(address, port)


async def test_regression_the_bound_on_connecting_is_one_for_tcp_and_tls_together(
    autojump_clock: MockClock,
) -> None:
    """Each step had the whole bound for itself: twice connect-timeout, and with a proxy four times."""
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as silent:  # the kernel takes the connection, nobody speaks TLS
        transport = BulkTransport(client_context(None), backend=Slow())
        request = httpx.Request("GET", f"https://127.0.0.1:{silent.getsockname()[1]}/")
        request.extensions = {"timeout": {"connect": 10.0}}
        before = trio.current_time()
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(request)
        assert trio.current_time() - before == pytest.approx(10)
        await transport.aclose()


async def test_names_are_remembered_for_a_while(autojump_clock: MockClock) -> None:
    names = Names("127.0.0.1")
    for _ in range(3):
        await names.addresses("name.test")
    assert names.asked == 1
    await trio.sleep(61)
    await names.addresses("name.test")
    assert names.asked == 2
    assert await names.addresses("192.0.2.1") == (ipaddress.ip_address("192.0.2.1"),)
    assert names.asked == 2
    with pytest.raises(OSError, match="no address"):
        await Names().addresses("name.test")


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True),
        ("10.0.0.1", True),
        ("172.16.0.1", True),
        ("192.168.1.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("::1", True),
        ("fe80::1", True),
        ("fd00::1", True),
        ("::ffff:127.0.0.1", True),
        ("2002:7f00:1::", True),
        ("::ffff:8.8.8.8", False),
        ("8.8.8.8", False),
        ("2606:4700::1111", False),
        ("64:ff9b::7f00:1", True),
        ("64:ff9b::808:808", False),
    ],
)
def test_private_addresses(address: str, private: bool) -> None:
    assert is_private(ipaddress.ip_address(address)) is private


async def test_it_is_an_httpx_transport() -> None:
    async with open_origin({PATH: DATA, "/chunked": DATA}) as origin:
        origin.always["/chunked"] = Fault(FaultKind.CHUNKED)
        transport = BulkTransport(client_context(None))
        async with httpx.AsyncClient(transport=transport) as client:
            for path in (PATH, "/chunked"):
                assert (await client.get(origin.url(path))).content == DATA
                assert (await client.head(origin.url(path))).content == b""
            origin.script(PATH, Fault(FaultKind.SHORT_BODY, after=100))
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(origin.url(PATH))
            with pytest.raises(httpx.ConnectError):
                await client.get(refused_url())
            origin.always["/slow"] = Fault(FaultKind.STALL_BEFORE_HEAD)
            with pytest.raises(httpx.ReadTimeout):
                await client.get(origin.url("/slow"), timeout=0.01)


def test_tls_is_checked_against_names_and_roots(tmp_path: Path) -> None:
    context = client_context(str(make_tls(tmp_path).ca))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2

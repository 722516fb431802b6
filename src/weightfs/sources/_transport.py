"""An httpx transport for big bodies: httpcore's pool, filled with `_connection.BulkConnection`s.

HTTP/1.1 only: ranges in parallel want connections of their own. Connections and idle connections are bounded.
Third-party exceptions leave here as httpx's; `_ranged` turns those into `SourceError`. Bodies are read with
`body_of(response).receive()`; `response.aiter_raw()` works too.
"""

from __future__ import annotations

import base64
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import cast
from urllib.parse import unquote

import certifi
import httpcore
import httpx

from weightfs.errors import ConfigError
from weightfs.sources._connection import Body, BulkConnection, Route
from weightfs.sources._rules import can_be_asked, host_of
from weightfs.sources._stream import BulkBackend

MAX_CONNECTIONS = 256  # far above what the engine fetches at once: waiting happens there, not in the pool
MAX_IDLE_CONNECTIONS = 64
IDLE_SECONDS = 15.0  # less than the idle bound of common servers and load balancers (60, 75 s)

# From the most specific: the first that matches is raised.
_MAPPED: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.TimeoutException, httpx.TimeoutException),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.NetworkError, httpx.NetworkError),
    (httpcore.ProxyError, httpx.ProxyError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
)


@contextmanager
def translated() -> Iterator[None]:
    """Raise httpx's exceptions in place of httpcore's; the original is the cause."""
    try:
        yield
    except tuple(theirs for theirs, _ in _MAPPED) as error:
        ours = next(ours for theirs, ours in _MAPPED if isinstance(error, theirs))
        raise ours(str(error)) from error


class _Stream(httpx.AsyncByteStream):
    """A body as httpx wants it. `closing` also tells the pool."""

    def __init__(self, body: Body, response: httpcore.Response) -> None:
        self.body = body
        self._response = response

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with translated():
            return await self.body.__anext__()

    async def aclose(self) -> None:
        await self._response.aclose()


def body_of(response: httpx.Response) -> Body:
    """The body of a response of `BulkTransport`. Its exceptions are httpcore's: use `translated` with it."""
    return cast("Body", response.extensions["body"])


class _Pool(httpcore.AsyncConnectionPool):
    """httpcore's pool, making our connections."""

    def __init__(self, route: Route, backend: httpcore.AsyncNetworkBackend) -> None:
        super().__init__(
            ssl_context=route.context,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=backend,
        )
        self._route = route
        self._backend = backend

    def create_connection(self, origin: httpcore.Origin) -> httpcore.AsyncConnectionInterface:
        return BulkConnection(origin, self._route, self._backend, IDLE_SECONDS)


class BulkTransport(httpx.AsyncBaseTransport):
    """Direct connections, or by an http(s) proxy: absolute-form for http targets, CONNECT for https ones.

    Requests have no bodies: this client only reads.
    """

    def __init__(
        self, context: ssl.SSLContext, *, proxy: str | None = None, backend: BulkBackend | None = None
    ) -> None:
        self._pool = _Pool(_route(context, proxy), backend or BulkBackend())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response with the body still to be read. httpx.TransportError."""
        core_request = httpcore.Request(
            method=request.method,
            url=_core_url(request.url),
            headers=request.headers.raw,
            extensions=request.extensions,
        )
        with translated():
            response = await self._pool.handle_async_request(core_request)
        body = response.extensions["body"]
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Stream(body, response),
            extensions=response.extensions,
            request=request,
        )

    @property
    def connections(self) -> list[httpcore.AsyncConnectionInterface]:
        """The open connections."""
        return self._pool.connections

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()


def client_context(ca_file: str | None) -> ssl.SSLContext:
    """TLS 1.2 and later, checking against certifi's roots, or against `ca_file` instead. ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=ca_file or certifi.where())
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The CA bundle {ca_file} cannot be read ({error}); name a PEM file.") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def proxy_for(url: httpx.URL, setting: str | None) -> str | None:
    """`setting`, else `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` (any case); None where `NO_PROXY` says so."""
    if urllib.request.proxy_bypass(f"{host_of(url)}:{url.port}" if url.port else host_of(url)):
        return None
    if setting is not None:
        return setting or None
    environment = urllib.request.getproxies()
    return environment.get(url.scheme) or environment.get("all")


def _route(context: ssl.SSLContext, proxy: str | None) -> Route:
    if proxy is None:
        return Route(context)
    try:
        url = httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
    except httpx.InvalidURL:
        url = httpx.URL("invalid://")
    if url.scheme not in ("http", "https") or not can_be_asked(url):
        raise ConfigError("The proxy setting is not an http:// or https:// URL; correct it or unset it.")
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if url.userinfo:
        credentials = f"{unquote(url.username)}:{unquote(url.password)}".encode()
        headers = ((b"Proxy-Authorization", b"Basic " + base64.b64encode(credentials)),)
    return Route(context, _core_url(url), headers)


def _core_url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)

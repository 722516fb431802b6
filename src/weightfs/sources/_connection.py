"""One HTTP/1.1 connection for httpcore's pool: h11 speaks the heads, bodies of known length go around it.

h11 copies each body byte four times in Python objects, which halves the speed of plain HTTP. So h11
serialises requests, parses response heads and undoes chunked coding; a body with Content-Length is
counted here and handed on as it came from the stream. Rules:

- A connection goes back to the pool only when head and body were consumed exactly, nothing more had arrived,
  and both sides keep it alive. In all other cases it is closed, at once and without waiting for the peer.
- A request on a *reused* connection that got no response byte raises `ConnectionNotAvailable`: the pool
  sends it again on another connection (RFC 9112 section 9.3.1 allows that for GET, HEAD; nothing else is
  sent here).
- No async generators: an abandoned one would be finalised at a time nobody chose.
"""

from __future__ import annotations

import enum
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import h11
import httpcore
import trio

from weightfs.sources._stream import BulkStream

MAX_HEAD_BYTES = 64 * 1024  # status line and all headers
MAX_INTERIM_RESPONSES = 8  # 100, 103: RFC 9110 section 15.2 allows any number
_IDEMPOTENT = (b"GET", b"HEAD")
_QUOTED = re.compile(r"""[: ]*(?:bytearray\()?b['"]""")


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach origins: TLS towards them, and the proxy in between, if any."""

    context: ssl.SSLContext
    proxy: httpcore.URL | None = None
    proxy_headers: tuple[tuple[bytes, bytes], ...] = ()


class _State(enum.Enum):
    NEW = enum.auto()
    ACTIVE = enum.auto()
    IDLE = enum.auto()
    CLOSED = enum.auto()


class BulkConnection(httpcore.AsyncConnectionInterface):
    """A connection to one origin, straight or through `route.proxy`."""

    def __init__(
        self,
        origin: httpcore.Origin,
        route: Route,
        backend: httpcore.AsyncNetworkBackend,
        idle_seconds: float,
    ) -> None:
        self._origin = origin
        self._route = route
        self._backend = backend
        self._idle_seconds = idle_seconds
        self._expires_at = 0.0
        self._state = _State.NEW
        self._stream: BulkStream | None = None
        self._requests = 0

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send a request without a body; return the response with its body unread. httpcore's exceptions."""
        if self._state not in (_State.NEW, _State.IDLE):
            raise httpcore.ConnectionNotAvailable
        reused = self._state is _State.IDLE
        self._state = _State.ACTIVE
        self._requests += 1
        timeouts = request.extensions.get("timeout", {})
        try:
            if self._stream is None:
                self._stream = await self._connect(timeouts.get("connect"))
            machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
            try:
                await self._send(machine, request, timeouts.get("write"))
                head = await read_head(machine, self._stream, timeouts.get("read"))
            except (_NoAnswerError, httpcore.WriteError) as error:
                if reused and request.method in _IDEMPOTENT:
                    raise httpcore.ConnectionNotAvailable from error
                raise
        except BaseException:
            self._close()
            raise
        body = Body(self, machine, head, request.method, timeouts)
        return httpcore.Response(
            status=head.status_code,
            headers=head.headers.raw_items(),
            content=body,
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "body": body,
                "network_stream": self._stream,
            },
        )

    async def _connect(self, timeout: float | None) -> BulkStream:  # noqa: ASYNC109  passed on to httpcore's interface
        """A connection that is ready for requests: `timeout` is for all the steps to it together."""
        try:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                return await self._connect_stepwise(timeout)
        except trio.TooSlowError as error:
            raise httpcore.ConnectTimeout(f"no connection, with TLS, in {timeout} s") from error

    async def _connect_stepwise(self, timeout: float | None) -> BulkStream:  # noqa: ASYNC109
        proxy = self._route.proxy
        first = self._origin if proxy is None else proxy.origin
        stream = await self._backend.connect_tcp(_host(first), first.port, timeout)
        try:
            if first.scheme == b"https":
                stream = await stream.start_tls(self._route.context, _host(first), timeout)
            if proxy is not None and self._origin.scheme == b"https":
                await self._tunnel(stream, timeout)
                stream = await stream.start_tls(self._route.context, _host(self._origin), timeout)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            raise
        assert isinstance(stream, BulkStream)
        return stream

    async def _tunnel(self, stream: httpcore.AsyncNetworkStream, timeout: float | None) -> None:  # noqa: ASYNC109
        """Ask the proxy for a tunnel (RFC 9110 section 9.3.6)."""
        host = self._origin.host.decode("ascii")
        authority = f"{f'[{host}]' if ':' in host else host}:{self._origin.port}".encode()
        machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        connect = h11.Request(
            method=b"CONNECT", target=authority, headers=[(b"Host", authority), *self._route.proxy_headers]
        )
        await stream.write(
            (machine.send(connect) or b"") + (machine.send(h11.EndOfMessage()) or b""), timeout
        )
        try:
            head = await read_head(machine, stream, timeout)
        except (httpcore.ReadTimeout, httpcore.ReadError, httpcore.RemoteProtocolError) as error:
            raise httpcore.ProxyError("the proxy did not answer CONNECT") from error
        if not 200 <= head.status_code < 300:
            raise httpcore.ProxyError(f"the proxy answered CONNECT with status {head.status_code}")
        if machine.trailing_data[0]:
            raise httpcore.ProxyError("the proxy sent bytes before the tunnel was used")

    async def _send(self, machine: h11.Connection, request: httpcore.Request, timeout: float | None) -> None:  # noqa: ASYNC109
        assert self._stream is not None
        target = request.url.target
        headers = list(request.headers)
        if self._route.proxy is not None and self._origin.scheme == b"http":
            target = bytes(request.url)  # absolute-form, RFC 9112 section 3.2.2
            headers += self._route.proxy_headers
        try:
            head = machine.send(h11.Request(method=request.method, target=target, headers=headers))
            end = machine.send(h11.EndOfMessage())
        except h11.LocalProtocolError as error:
            raise httpcore.LocalProtocolError(_unquoted(error)) from None
        await self._stream.write((head or b"") + (end or b""), timeout)

    def release(self, *, reusable: bool) -> None:
        """Called by `Body` when it ends: back to the pool, or closed."""
        if self._state is not _State.ACTIVE:
            return
        if reusable:
            self._state = _State.IDLE
            self._expires_at = trio.current_time() + self._idle_seconds
        else:
            self._close()

    def _close(self) -> None:
        self._state = _State.CLOSED
        if self._stream is not None:
            self._stream.close()

    async def aclose(self) -> None:
        """Close at once."""
        self._close()

    def can_handle_request(self, origin: httpcore.Origin) -> bool:
        """Whether this is a connection to that origin."""
        return origin == self._origin

    def is_available(self) -> bool:
        """Whether a request could be sent now."""
        return self._state is _State.IDLE

    def has_expired(self) -> bool:
        """Whether it was idle for too long, or the server spoke unasked (it can only have ended)."""
        if self._state is not _State.IDLE:
            return False
        assert self._stream is not None
        return trio.current_time() > self._expires_at or bool(self._stream.get_extra_info("is_readable"))

    def is_idle(self) -> bool:
        """Whether it is open and unused."""
        return self._state is _State.IDLE

    def is_closed(self) -> bool:
        """Whether it is of no more use."""
        return self._state is _State.CLOSED

    def info(self) -> str:
        """For logs."""
        return f"{self._origin}, {self._state.name}, {self._requests} requests"


class Body:
    """A response body. `receive` gives what has arrived; `aclose` may come at any time."""

    def __init__(
        self,
        connection: BulkConnection,
        machine: h11.Connection,
        head: h11.Response,
        method: bytes,
        timeouts: Any,
    ) -> None:
        assert connection._stream is not None
        self._connection = connection
        self._stream = connection._stream
        self._machine = machine
        self._timeouts = timeouts
        self._keep_alive = (
            head.http_version == b"1.1"
            and machine.our_state is not h11.MUST_CLOSE
            and not _has_token(head, b"connection", b"close")
        )
        self._remaining = _direct_length(head, method)
        self._early = b""
        self._overrun = False
        if self._remaining is not None:
            early = machine.trailing_data[0]
            self._early = early[: self._remaining]
            self._overrun = len(early) > self._remaining

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self.receive():
            return piece
        raise StopAsyncIteration

    async def receive(self) -> bytes:
        """The next bytes, in pieces of any length; b'' at the exact end. httpcore's exceptions."""
        if self._remaining is None:
            return await self._receive_by_h11()
        if not self._remaining:
            return b""
        if self._early:
            piece, self._early = self._early, b""
        else:
            piece = await self._stream.read(self._remaining, self._timeouts.get("read"))
        if not piece:
            raise EndedError(f"the connection ended {self._remaining} bytes too early")
        if len(piece) > self._remaining:
            self._overrun = True
            piece = piece[: self._remaining]
        self._remaining -= len(piece)
        return piece

    async def _receive_by_h11(self) -> bytes:
        while True:
            match await next_event(self._machine, self._stream, self._timeouts.get("read")):
                case h11.Data(data=data) if data:
                    return bytes(data)
                case h11.EndOfMessage() | h11.ConnectionClosed() | h11.PAUSED:
                    return b""

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        if self._remaining is None:
            done = self._machine.their_state is h11.DONE and not self._machine.trailing_data[0]
        else:
            done = self._remaining == 0 and not self._overrun
        self._connection.release(reusable=done and self._keep_alive)

    @property
    def overrun(self) -> bool:
        """Whether more came than the head had promised (seen only if it came together with the last byte)."""
        return self._overrun


class EndedError(httpcore.RemoteProtocolError):
    """The peer ended the connection properly, but too early."""


class _NoAnswerError(EndedError):
    """The connection ended before the first byte of a response."""


async def next_event(
    machine: h11.Connection,
    stream: httpcore.AsyncNetworkStream,
    timeout: float | None,  # noqa: ASYNC109  passed on to httpcore's interface
) -> Any:
    """The next h11 event, reading as long as it takes. httpcore's exceptions."""
    ended = False
    while True:
        try:
            event = machine.next_event()
        except h11.RemoteProtocolError as error:
            raise (EndedError if ended else httpcore.RemoteProtocolError)(_unquoted(error)) from None
        if event is not h11.NEED_DATA:
            return event
        try:
            data = await stream.read(MAX_HEAD_BYTES, timeout)
        except httpcore.ReadError as error:
            if machine.their_state is h11.SEND_RESPONSE and not machine.trailing_data[0]:
                raise _NoAnswerError(str(error)) from error
            raise
        if not data and machine.their_state is h11.SEND_RESPONSE:
            if not machine.trailing_data[0]:
                raise _NoAnswerError("the connection ended without a response")
            raise EndedError("the connection ended amid the response head")
        ended = not data
        machine.receive_data(data)


async def read_head(
    machine: h11.Connection,
    stream: httpcore.AsyncNetworkStream,
    timeout: float | None,  # noqa: ASYNC109  passed on to httpcore's interface
) -> h11.Response:
    """The final response head, past at most MAX_INTERIM_RESPONSES interim ones. httpcore's exceptions."""
    for _ in range(MAX_INTERIM_RESPONSES + 1):
        event = await next_event(machine, stream, timeout)
        if isinstance(event, h11.Response):
            return event
        if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
            raise httpcore.RemoteProtocolError("an unasked-for protocol switch")
    raise httpcore.RemoteProtocolError("too many interim responses")


def _direct_length(head: h11.Response, method: bytes) -> int | None:
    """The body's length where Content-Length alone frames it (RFC 9112 section 6.3); None: let h11 do it."""
    if method == b"HEAD" or head.status_code in (204, 304) or _has_header(head, b"transfer-encoding"):
        return None
    # h11 has checked that there is one value, of digits only.
    return next((int(value) for name, value in head.headers if name == b"content-length"), None)


def _has_header(head: h11.Response, wanted: bytes) -> bool:
    return any(name == wanted for name, _ in head.headers)


def _has_token(head: h11.Response, header: bytes, token: bytes) -> bool:
    values = (value for name, value in head.headers if name == header)
    return any(token == part.strip().lower() for value in values for part in value.split(b","))


def _unquoted(error: h11.ProtocolError) -> str:
    """What h11 says, without the line that it is about: that may have 64 KiB, and give back our own headers."""
    return _QUOTED.split(str(error), maxsplit=1)[0]


def _host(origin: httpcore.Origin) -> str:
    return origin.host.decode("ascii")

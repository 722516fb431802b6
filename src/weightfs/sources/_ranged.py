"""The strict range reader: the bytes that were asked for, exactly, or a `SourceError`.

Rules:

- Headers are checked by `_rules` before the first byte counts; the last piece is held back until the
  body's end is certain. A body is bounded by progress: MIN_PROGRESS bytes in every `stall_timeout` of
  waiting (the reader's own time between pieces does not count).
- Where a URL redirects to (a signed URL, usually) is found out once for all who want it, and remembered
  until it ends. When the remembered place answers 401, 403, 404 or 410 it is forgotten, and found out
  once more for all, inside the same call: no retry is spent.
- Nothing is retried here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Self

import httpx
import trio

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Mirror
from weightfs.errors import FailureKind
from weightfs.sources import _rules
from weightfs.sources._client import Answer, Headers, HttpClient, parse_url, translate
from weightfs.sources._connection import EndedError
from weightfs.sources._transport import body_of, translated

MIN_PROGRESS = 16 * 1024  # bytes per stall_timeout; at 30 s, half a KiB a second: nobody waits for less
ROUTE_SECONDS = 300.0  # how long a redirect that names no end is remembered
MAX_ROUTES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """Where a URL's bytes are; compared by identity. `at_home`: the way there never left the URL's origin."""

    url: httpx.URL
    redirected: bool
    at_home: bool
    ends_at: float


class _Routes:
    """URL → where it leads. For each URL one task at a time finds out; the others wait for it."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Route] = OrderedDict()
        self._finding: dict[str, trio.Event] = {}

    async def get(self, url: str, now: float) -> _Route | None:
        """The remembered route, or None: then the caller finds out, and must call `found` or `lost`.

        While somebody finds out, others wait. If that fails they all try for themselves: nobody waits for
        a row of failures.
        """
        finding = None if self._valid(url, now) else self._finding.get(url)
        if finding is not None:
            await finding.wait()  # bounded: `_find` is
        route = self._valid(url, now)
        if route is None:
            self._finding.setdefault(url, trio.Event())
        return route

    def _valid(self, url: str, now: float) -> _Route | None:
        route = self._known.get(url)
        if route is None or route.ends_at <= now:
            return None
        self._known.move_to_end(url)
        return route

    def found(self, url: str, route: _Route) -> None:
        self._known[url] = route
        self._known.move_to_end(url)
        while len(self._known) > MAX_ROUTES:
            self._known.popitem(last=False)
        self.lost(url)

    def lost(self, url: str) -> None:
        if (finding := self._finding.pop(url, None)) is not None:
            finding.set()

    def forget(self, url: str, route: _Route) -> None:
        if self._known.get(url) is route:
            del self._known[url]


class RangeReader:
    """Opens spans of blobs at http(s) mirrors, with the connections of `client`."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._routes = _Routes()

    @asynccontextmanager
    async def open(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False, secrets: Headers = ()
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """`Source.open_range` for http(s). `secrets`: headers for the mirror's own origin (Authorization)."""
        if span.stop > shape.size or (whole and len(span) != shape.size):
            raise ValueError(f"{span} is not what can be read of {shape.size} bytes")
        if not len(span) and not whole:
            yield _Nothing()
            return
        headers: list[tuple[str, str]] = []
        if not whole:
            headers.append(("Range", f"bytes={span.start}-{span.stop - 1}"))
            if mirror.validator.startswith('"'):
                headers.append(("If-Range", mirror.validator))
        answer = await self._ask(mirror.url, headers, secrets)
        try:
            if whole:
                _rules.check_whole(answer.status, answer.headers, shape.size, mirror.validator, answer.url)
            else:
                _rules.check_partial(
                    answer.status, answer.headers, span, shape.size, mirror.validator, answer.url
                )
            yield _SpanBody(answer, len(span), self._client.settings.stall_timeout)
        finally:
            # Cancelled or not: closing never waits for the peer.
            with trio.CancelScope(shield=True):
                await answer.response.aclose()

    async def _ask(self, url: str, headers: Headers, secrets: Headers) -> Answer:
        """The answer of wherever `url` leads; error statuses are SourceErrors, except 416."""
        client = self._client
        start = parse_url(url)
        mine = client.secrets_for(start, secrets)
        refreshed = False
        while True:
            route = await self._routes.get(url, client.wall_clock())
            if route is None:
                answer = await self._find(url, start, headers, mine)
                break
            if route.at_home:
                response = await client.ask("GET", route.url, headers, mine)
            else:
                response = await client.send("GET", route.url, headers)
            answer = Answer(response, route.url, route.at_home)
            moved = answer.status in _rules.REDIRECTS
            if not refreshed and (moved or (route.redirected and answer.status in _rules.EXPIRED)):
                refreshed = True
                await client.discard(response)
                self._routes.forget(url, route)
                continue
            break
        error = _rules.status_failure(answer.status, answer.headers, answer.url, client.now())
        if error is not None:
            await client.discard(answer.response)
            raise error
        return answer

    async def _find(self, url: str, start: httpx.URL, headers: Headers, secrets: Headers) -> Answer:
        """Follow the redirects of `url` with the real request; remember where they led if it answers."""
        client = self._client
        bound = 2 * (client.settings.connect_timeout + client.settings.timeout)
        try:
            with trio.fail_after(bound):
                answer = await client.chase("GET", start, headers, secrets)
        except trio.TooSlowError as error:
            raise _rules.failure(FailureKind.TIMEOUT, start, "did not stop redirecting in time") from error
        else:
            if answer.status < 400:
                redirected = answer.url != start
                ends_at = float("inf")
                if redirected:
                    ends_at = _rules.expires_at(answer.url) or client.wall_clock() + ROUTE_SECONDS
                self._routes.found(url, _Route(answer.url, redirected, answer.at_home, ends_at))
            return answer
        finally:
            self._routes.lost(url)


class _Nothing:
    """The body of an empty span."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


class _SpanBody:
    """Exactly `length` bytes, in pieces as they arrive."""

    def __init__(self, answer: Answer, length: int, stall_timeout: float) -> None:
        self._body = body_of(answer.response)
        self._url = answer.url
        self._left = length
        self._length = length
        self._stall_timeout = stall_timeout
        self._waited = 0.0
        self._progress = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        piece = await self._receive()
        if not piece:
            raise self._short()
        if len(piece) > self._left:
            raise self._long()
        self._left -= len(piece)
        # The end of a chunked body, or of a connection, is known only when it has come.
        if not self._left and await self._receive():
            raise self._long()
        return piece

    async def _receive(self) -> bytes:
        began = trio.current_time()
        try:
            with translated(), trio.fail_after(max(0.0, self._stall_timeout - self._waited)):
                piece = await self._body.receive()
        except trio.TooSlowError as error:
            raise _rules.failure(
                FailureKind.STALL, self._url, f"stalled for {self._stall_timeout:g} s {self._where()}"
            ) from error
        except httpx.TransportError as error:
            if isinstance(error.__cause__, EndedError):
                raise self._short() from error
            raise translate(error, self._url) from error
        self._waited += trio.current_time() - began
        self._progress += len(piece)
        if self._progress >= MIN_PROGRESS:
            self._progress, self._waited = 0, 0.0
        return piece

    def _where(self) -> str:
        return f"after {self._length - self._left} of {self._length} bytes"

    def _short(self) -> Exception:
        return _rules.failure(FailureKind.SHORT, self._url, f"broke off {self._where()}")

    def _long(self) -> Exception:
        return _rules.failure(
            FailureKind.PROTOCOL, self._url, f"sent more than the {self._length} bytes asked for"
        )


class RangedSource:
    """What the sources over http share: spans are read by one `RangeReader`, and the client is theirs to close."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._reader = RangeReader(client)

    def open_range(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream `span` from `mirror`: see `Source.open_range`."""
        return self._reader.open(mirror, shape, span, whole=whole)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

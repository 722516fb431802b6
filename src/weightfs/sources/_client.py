"""One request at a time, without redirects, with every phase bounded; and the redirect rules around it.

Rules:

- The head of a response comes within `connect_timeout + timeout`, however slowly it drips.
- `Authorization` and the user's headers go to the origin (scheme, host, port) they were meant for. Once a
  redirect has left it they are gone for the rest of the chain, even if it comes back: the way back was
  chosen by a stranger.
- A 401 of a container registry's own origin is answered with a token (`_tokens`), and the request sent once
  more; who asks sees only the second answer.
- A public host may not redirect to a private address (`settings.private_hosts` lists exceptions), and
  https never to http. The addresses that were checked are those that are connected to: `Resolver`
  remembers them.
"""

from __future__ import annotations

import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpcore
import httpx
import trio

from weightfs import __version__
from weightfs.core.retry import delay, is_permanent
from weightfs.errors import FailureKind, SourceError
from weightfs.sources import _rules
from weightfs.sources._connection import EndedError
from weightfs.sources._stream import BulkBackend, TlsRefusedError, is_private, literal_address
from weightfs.sources._tokens import MAX_TOKEN_BYTES, Tokens
from weightfs.sources._transport import BulkTransport, body_of, client_context, proxy_for, translated
from weightfs.sources.base import FetchSettings

MAX_REDIRECTS = 8
RETRY_DELAY_CAP = 30.0
DRAIN_BYTES = 16 * 1024  # the body of a redirect or error worth reading to keep its connection
USER_AGENT = f"weightfs/{__version__}"

_HTTP = re.compile("https?://")

Headers = Sequence[tuple[str, str]]
Ask = Callable[[str, httpx.URL, Headers, Headers], Awaitable[httpx.Response]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response with its body unread, where it came from, and whether the way left its first origin."""

    response: httpx.Response
    url: httpx.URL
    at_home: bool

    @property
    def status(self) -> int:
        """The HTTP status code."""
        return self.response.status_code

    @property
    def headers(self) -> httpx.Headers:
        """The response headers."""
        return self.response.headers


@dataclass(frozen=True, slots=True)
class Reply:
    """A small response, read whole."""

    status: int
    headers: httpx.Headers
    body: bytes
    url: httpx.URL


class TooLongError(SourceError):
    """A small document that is not small."""


class HttpClient:
    """The connections of one source. Bound to one trio run.

    Args:
        settings: bounds, proxy, CA bundle, the user's headers.
        backend: connects and resolves; tests give one that lies about addresses.
        wall_clock: seconds since 1970.
        jitter: a float in [0, 1).
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        backend: BulkBackend | None = None,
        wall_clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self.wall_clock = wall_clock
        self._jitter = jitter
        self._backend = backend or BulkBackend()
        self._context: ssl.SSLContext | None = None
        self._transports: dict[str | None, BulkTransport] = {}
        self.tokens = Tokens(self._fetch_token, settings.docker_config)
        # Origins that get `settings.headers`: those configured, and those of the refs that were resolved
        # here. Refs of registries (hf://, ollama://) are named there too, and are no URLs.
        self._homes = {_rules.origin_of(url) for url in settings.header_origins if _HTTP.match(url)}

    def own(self, url: str) -> None:
        """Let the user's headers go to the origin of `url`, the ref's own."""
        self._homes.add(_rules.origin_of(url))

    def secrets_for(self, url: httpx.URL, extra: Headers = ()) -> Headers:
        """The headers that only the origin of `url` may see."""
        settings, origin = self.settings, _rules.origin_of(url)
        mine = settings.headers if origin in self._homes else ()
        given = any(name.lower() == "authorization" for name, _ in extra)
        if settings.hf_token and not given and origin == _rules.origin_of(settings.hf_endpoint):
            # An Authorization among the user's headers is for every host that was named, the token for this one.
            others = [(name, value) for name, value in mine if name.lower() != "authorization"]
            return (*others, *extra, ("Authorization", f"Bearer {settings.hf_token}"))
        return (*mine, *extra)

    def now(self) -> datetime:
        """The wall clock's time, in UTC."""
        return datetime.fromtimestamp(self.wall_clock(), UTC)

    async def send(self, method: str, url: httpx.URL, headers: Headers) -> httpx.Response:
        """One request; the response has its body unread: close it or give it to `discard`. SourceError."""
        settings = self.settings
        timeouts: dict[str, float | None] = {
            "connect": settings.connect_timeout,
            "read": settings.timeout,
            "write": settings.timeout,
            "pool": None,
        }
        base = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
        given = {name.lower() for name, _ in headers}
        defaults = [pair for pair in base.items() if pair[0].lower() not in given]
        try:
            request = httpx.Request(method, url, headers=[*defaults, *headers])
            request.extensions = {"timeout": timeouts}
            with trio.fail_after(settings.connect_timeout + settings.timeout):
                response = await self._transport(url).handle_async_request(request)
        except trio.TooSlowError as error:
            raise _rules.failure(FailureKind.TIMEOUT, url, "did not answer in time") from error
        except (httpx.TransportError, httpx.InvalidURL, UnicodeError) as error:
            raise translate(error, url) from error
        timeouts["read"] = None  # from here on the caller bounds each wait
        return response

    async def ask(self, method: str, url: httpx.URL, headers: Headers, secrets: Headers) -> httpx.Response:
        """As `send`, for the origin that `secrets` are for: a registry's challenge is answered, once."""
        if any(name.lower() == "authorization" for name, _ in secrets):
            return await self.send(method, url, [*headers, *secrets])
        known = await self.tokens.known(url)
        response = await self.send(method, url, [*headers, *secrets, *known])
        if response.status_code != 401:
            return response
        try:
            fresh = await self.tokens.answer(url, response.headers, known)
        except BaseException:
            with trio.CancelScope(shield=True):
                await response.aclose()
            raise
        if fresh is None:
            return response
        await self.discard(response)
        return await self.send(method, url, [*headers, *secrets, *fresh])

    async def discard(self, response: httpx.Response) -> None:
        """Close a response of no more use; reads a small body to its end, so that the connection lives on."""
        body = body_of(response)
        try:
            with translated(), trio.move_on_after(1):
                left = DRAIN_BYTES
                while left > 0 and (piece := await body.receive()):
                    left -= len(piece)
        except httpx.TransportError:
            pass  # it is closed below
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()

    async def chase(self, method: str, url: httpx.URL, headers: Headers, secrets: Headers) -> Answer:
        """A request, following redirects by hand. SourceError; REDIRECT for a chain that may not be."""
        return await self._follow(self.ask, method, url, headers, secrets)

    async def _follow(
        self, ask: Ask, method: str, url: httpx.URL, headers: Headers, secrets: Headers
    ) -> Answer:
        """`chase`, with `ask` for as long as the way has not left its first origin."""
        seen = {str(url)}
        start, at_home = url, True
        for _ in range(MAX_REDIRECTS + 1):
            response = await (
                ask(method, url, headers, secrets) if at_home else self.send(method, url, headers)
            )
            if response.status_code not in _rules.REDIRECTS:
                return Answer(response, url, at_home)
            await self.discard(response)
            hop = _rules.next_hop(url, response.headers)
            if str(hop.url) in seen:
                raise _rules.failure(FailureKind.REDIRECT, start, "redirects in a loop")
            await self._check_address(start, hop.url)
            seen.add(str(hop.url))
            url, at_home = hop.url, at_home and not hop.leaves
        raise _rules.failure(FailureKind.REDIRECT, start, f"redirects more than {MAX_REDIRECTS} times")

    async def fetch(
        self,
        url: str,
        *,
        limit: int,
        method: str = "GET",
        headers: Headers = (),
        secrets: Headers = (),
        accept: frozenset[int] = frozenset({200}),
    ) -> Reply:
        """A small document, whole, with redirects and retries. SourceError if its status is not in `accept`.

        Args:
            url: http(s).
            limit: the most body bytes that are taken.
            method: GET or HEAD.
            headers: sent along the whole chain.
            secrets: sent to the URL's own origin only; the user's headers are added where they belong.
            accept: statuses that are an answer.
        """
        target = parse_url(url)
        attempt = 0
        while True:
            try:
                return await self._fetch_once(target, limit, method, headers, secrets, accept)
            except SourceError as error:
                await self.back_off(attempt, error)
            attempt += 1

    async def back_off(self, attempt: int, error: SourceError) -> None:
        """Wait before retry `attempt` (full jitter, Retry-After honoured); raise `error` if none is due."""
        if is_permanent(error.kind) or isinstance(error, TooLongError) or attempt >= self.settings.retry:
            raise error
        await trio.sleep(
            delay(
                attempt,
                base=self.settings.retry_delay,
                cap=RETRY_DELAY_CAP,
                retry_after=error.retry_after,
                jitter=self._jitter(),
            )
        )

    async def _fetch_once(
        self,
        url: httpx.URL,
        limit: int,
        method: str,
        headers: Headers,
        secrets: Headers,
        accept: frozenset[int],
    ) -> Reply:
        answer = await self.chase(method, url, headers, self.secrets_for(url, secrets))
        return await self._read_reply(answer, url, limit, accept)

    async def _fetch_token(self, registry: httpx.URL, realm: httpx.URL, secrets: Headers) -> bytes:
        """What a token server answers. A challenge of its own is not answered: that could go on for ever."""
        await self._check_address(registry, realm)

        async def plainly(method: str, url: httpx.URL, headers: Headers, secrets: Headers) -> httpx.Response:
            return await self.send(method, url, [*headers, *secrets])

        answer = await self._follow(plainly, "GET", realm, (), secrets)
        return (await self._read_reply(answer, realm, MAX_TOKEN_BYTES, frozenset({200}))).body

    async def _read_reply(self, answer: Answer, url: httpx.URL, limit: int, accept: frozenset[int]) -> Reply:
        if answer.status not in accept:
            await self.discard(answer.response)
            error = _rules.status_failure(answer.status, answer.headers, answer.url, self.now())
            raise error or _rules.failure(
                FailureKind.PROTOCOL, url, f"answered with status {answer.status}", status=answer.status
            )
        try:
            _rules.check_coding(answer.headers, answer.url)
            with trio.fail_after(self.settings.timeout):
                body = await _read_all(answer.response, limit, answer.url)
        except trio.TooSlowError as error:
            raise _rules.failure(FailureKind.STALL, url, "did not finish its answer in time") from error
        finally:
            with trio.CancelScope(shield=True):
                await answer.response.aclose()
        return Reply(answer.status, answer.headers, body, answer.url)

    async def _check_address(self, start: httpx.URL, target: httpx.URL) -> None:
        host = _rules.host_of(target)
        if host == _rules.host_of(start) or host in self.settings.private_hosts:
            return
        if await self._is_private(target) and not await self._is_private(start):
            raise _rules.failure(
                FailureKind.REDIRECT,
                start,
                f"redirects from a public host to the private address of {host[:100]}; "
                "add that host to private_hosts if this is meant",
            )

    async def _is_private(self, url: httpx.URL) -> bool:
        host = _rules.host_of(url)
        literal = literal_address(host)
        if literal is not None:
            return is_private(literal)
        if host == "localhost" or host.endswith(".localhost"):
            return True
        if proxy_for(url, self.settings.proxy) is not None:
            return False  # the proxy resolves names, and has rules of its own
        try:
            with trio.fail_after(self.settings.connect_timeout):
                addresses = await self._backend.resolver.addresses(host)
        except (OSError, UnicodeError, trio.TooSlowError) as error:
            raise _rules.failure(FailureKind.CONNECT, url, "could not be resolved to an address") from error
        return any(is_private(address) for address in addresses)

    def _transport(self, url: httpx.URL) -> BulkTransport:
        proxy = proxy_for(url, self.settings.proxy)
        if proxy not in self._transports:
            if self._context is None:
                self._context = client_context(self.settings.ca_file)
            self._transports[proxy] = BulkTransport(self._context, proxy=proxy, backend=self._backend)
        return self._transports[proxy]

    async def aclose(self) -> None:
        """Close every connection."""
        for transport in self._transports.values():
            await transport.aclose()
        self._transports.clear()


def parse_url(url: str) -> httpx.URL:
    """An http(s) URL without fragment. SourceError if it is none."""
    try:
        parsed = httpx.URL(url).copy_with(fragment=None)
    except httpx.InvalidURL as error:
        raise _rules.failure(FailureKind.PROTOCOL, "", "is not a URL that can be fetched") from error
    if parsed.scheme not in ("http", "https") or not _rules.can_be_asked(parsed):
        raise _rules.failure(FailureKind.PROTOCOL, url, "is not an http(s) URL")
    return parsed


def translate(error: Exception, url: httpx.URL) -> SourceError:
    """What a transport's exception means."""
    cause = error.__cause__
    match error:
        case httpx.ConnectError() if isinstance(cause, TlsRefusedError):
            kind, what = FailureKind.TLS, f"was not trusted: {cause}"
        case httpx.ConnectError():
            kind, what = FailureKind.CONNECT, f"could not be reached ({error})"
        case httpx.TimeoutException():
            kind, what = FailureKind.TIMEOUT, "did not answer in time"
        case httpx.ProxyError():
            kind = FailureKind.AUTH if " 407" in str(error) else FailureKind.CONNECT
            what = f"could not be reached: {error}"
        case httpx.RemoteProtocolError() if not isinstance(cause, EndedError):
            kind, what = FailureKind.PROTOCOL, f"did not speak proper HTTP ({error})"
        case httpx.NetworkError() | httpx.RemoteProtocolError():
            kind, what = FailureKind.RESET, f"broke the connection ({error})"
        case _:
            kind, what = FailureKind.PROTOCOL, "cannot be asked: the request is not valid HTTP"
    return _rules.failure(kind, url, what)


async def _read_all(response: httpx.Response, limit: int, url: httpx.URL) -> bytes:
    body = body_of(response)
    parts: list[bytes] = []
    total = 0
    try:
        with translated():
            while piece := await body.receive():
                total += len(piece)
                if total > limit:
                    what = f"{_rules.label(url)} sent more than {limit} bytes."
                    raise TooLongError(what, kind=FailureKind.PROTOCOL, mirror=_rules.label(url))
                parts.append(piece)
    except httpx.TransportError as error:
        if isinstance(error.__cause__, EndedError | httpcore.ReadError):
            raise _rules.failure(FailureKind.SHORT, url, "broke off its answer") from error
        raise translate(error, url) from error
    return b"".join(parts)

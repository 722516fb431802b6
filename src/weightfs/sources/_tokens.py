"""Answers to the challenges of container registries: bearer tokens and Basic, wherever a registry's URL is read.

Rules (distribution specification, "Token Authentication"):

- Only a 401 of the URL's own origin is answered, and only below `/v2/`. A token goes to that origin and no other.
- The token server (realm) may be another host, but no other way in: what a redirect may not do, a realm may not either.
  Credentials are sent to it only if nobody on the way can have named it, or can read them: both it and the registry are
  https, or this machine.
- One task asks for a token; the others that need it wait for the same answer, good or bad.

Tokens are remembered per origin and repository, and a remembered challenge is answered again before its token ends: so
an end in mid-download costs no request that fails, and no retry.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import trio

from weightfs.errors import FailureKind, SourceError
from weightfs.sources import _rules
from weightfs.sources._challenges import Challenge, parse_challenges
from weightfs.sources._docker_config import Credentials, SecretKind, credentials_for, login_name
from weightfs.sources._homes import is_loopback

MAX_TOKEN_BYTES = 64 * 1024  # of a token server's answer
MAX_TOKEN_CHARS = 16 * 1024  # servers refuse heads of more
DEFAULT_SECONDS = 60.0  # where no expires_in is given (distribution specification)
MAX_SECONDS = 24 * 3600.0
MARGIN_SECONDS = 10.0  # before its end a token is renewed; of a short life, a tenth
MAX_TOKENS = 256
MAX_PATH_CHARS = 1024  # of a URL that can be a blob's: a repository has 255, a digest 71

_REGISTRY_PATH = re.compile(
    r"(?:/.*)?/v2/(?P<name>[a-z0-9A-Z._/-]{1,512})/(?:blobs|manifests|chunksums)/[^/]+"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TOKEN = re.compile(r"[\x21-\x7e]+")
# What Azure takes beside an identity token; docker would POST it, and this client only reads.
_IDENTITY_USER = "00000000-0000-0000-0000-000000000000"

Pair = tuple[str, str]
# (registry URL, token server's URL, headers for the latter) → its answer's body
Fetch = Callable[[httpx.URL, httpx.URL, Sequence[Pair]], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Key:
    origin: str
    repository: str


@dataclass(slots=True)
class _Flight:
    """A token that is being asked for."""

    landed: trio.Event = field(default_factory=trio.Event)
    done: bool = False
    error: SourceError | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    """The answer to a challenge; `value` is an `Authorization` header. Times by trio's clock."""

    challenge: Challenge
    value: str = field(repr=False)
    ends_at: float
    with_credentials: bool


class Tokens:
    """The tokens of one client. Bound to one trio run."""

    def __init__(self, fetch: Fetch, docker_config: str | None) -> None:
        self._fetch = fetch
        self._docker_config = docker_config
        self._held: OrderedDict[_Key, _Held] = OrderedDict()
        self._flights: dict[_Key, _Flight] = {}

    async def known(self, url: httpx.URL) -> Sequence[Pair]:
        """The headers that a request for `url` should carry, as far as its registry has said. SourceError."""
        key = _key_of(url)
        held = None if key is None else self._held.get(key)
        if key is None or held is None:
            return ()
        if held.ends_at <= trio.current_time():
            held = await self._renew(key, url, held.challenge)
        return () if held is None else (("Authorization", held.value),)

    async def answer(
        self, url: httpx.URL, headers: httpx.Headers, sent: Sequence[Pair]
    ) -> Sequence[Pair] | None:
        """What to send after a 401 with these `headers` to a request with `sent`; None: nothing would help.

        SourceError if the token server gave none.
        """
        key = _key_of(url)
        challenge = _choose(parse_challenges(", ".join(headers.get_list("www-authenticate"))))
        if key is None or challenge is None:
            return None
        held = self._held.get(key)
        stale = sent[0][1] if sent else ""
        if held is None or held.value == stale or held.ends_at <= trio.current_time():
            held = await self._renew(key, url, challenge)
        return None if held is None or held.value == stale else (("Authorization", held.value),)

    def used_credentials(self, url: httpx.URL) -> bool:
        """Whether what the registry was last sent for this URL's repository stood for a user."""
        key = _key_of(url)
        held = None if key is None else self._held.get(key)
        return held is not None and held.with_credentials

    async def _renew(self, key: _Key, url: httpx.URL, challenge: Challenge) -> _Held | None:
        """Ask once for all who want it. None if there are no credentials for a Basic challenge."""
        while (flight := self._flights.get(key)) is not None:
            await flight.landed.wait()  # bounded: `_obtain` is
            if flight.error is not None:
                raise _copy(flight.error)
            if flight.done:  # else who asked was cancelled
                return self._held.get(key)
        flight = self._flights[key] = _Flight()
        try:
            held = await self._obtain(key, url, challenge)
        except SourceError as error:
            flight.error = error
            raise
        else:
            self._keep(key, held)
            flight.done = True
            return held
        finally:
            del self._flights[key]
            flight.landed.set()

    def _keep(self, key: _Key, held: _Held | None) -> None:
        self._held.pop(key, None)
        if held is not None:
            self._held[key] = held
        while len(self._held) > MAX_TOKENS:
            self._held.popitem(last=False)

    async def _obtain(self, key: _Key, url: httpx.URL, challenge: Challenge) -> _Held | None:
        credentials = None
        if _is_safe(url):
            authority = url.netloc.decode("ascii")
            credentials = await credentials_for(self._docker_config, authority)
        if challenge.scheme == "basic":
            if credentials is None or credentials.kind is not SecretKind.PASSWORD:
                return None
            return _Held(challenge, credentials.basic, float("inf"), with_credentials=True)
        if credentials is not None and credentials.kind is SecretKind.REGISTRY:
            return _Held(challenge, f"Bearer {credentials.secret}", float("inf"), with_credentials=True)
        realm = _realm_of(url, challenge, key.repository)
        if not _is_safe(realm):
            credentials = None
        try:
            body = await self._fetch(url, realm, _login(credentials))
        except SourceError as error:
            raise _explained(error, url, realm, credentials) from error
        token, seconds = _read_token(body, realm)
        ends_at = trio.current_time() + seconds - min(MARGIN_SECONDS, seconds / 10)
        return _Held(challenge, f"Bearer {token}", ends_at, with_credentials=credentials is not None)


def _key_of(url: httpx.URL) -> _Key | None:
    found = _REGISTRY_PATH.fullmatch(url.path) if len(url.path) <= MAX_PATH_CHARS else None
    return None if found is None else _Key(_rules.origin_of(url), found["name"])


def _choose(challenges: Sequence[Challenge]) -> Challenge | None:
    """The first Bearer challenge that says where (the Hub's realm is a sentence, not a server), else Basic."""
    usable = [c for c in challenges if c.scheme == "bearer" and _URL.match(c.parameters.get("realm", ""))]
    usable += [c for c in challenges if c.scheme == "basic"]
    return usable[0] if usable else None


def _is_safe(url: httpx.URL) -> bool:
    """Whether nobody on the way can read or change what is sent there."""
    return url.scheme == "https" or is_loopback(_rules.host_of(url))


def _realm_of(url: httpx.URL, challenge: Challenge, repository: str) -> httpx.URL:
    """The token server's URL, with what is asked of it. SourceError if it may not be one."""
    text = challenge.parameters["realm"]
    try:
        realm = httpx.URL(text[: _rules.MAX_URL]).copy_with(fragment=None)
    except httpx.InvalidURL as error:
        raise _rules.failure(FailureKind.REDIRECT, url, "names a token server that is no URL") from error
    if realm.scheme not in ("http", "https") or not _rules.can_be_asked(realm) or realm.userinfo:
        raise _rules.failure(FailureKind.REDIRECT, url, "names a token server that is no http(s) URL")
    if url.scheme == "https" and realm.scheme == "http":
        raise _rules.failure(
            FailureKind.REDIRECT,
            url,
            f"is https and names a token server that is not ({_rules.label(realm)})",
        )
    wanted = []
    if service := challenge.parameters.get("service"):
        wanted.append(("service", service))
    scopes = challenge.parameters.get("scope", "").split() or [f"repository:{repository}:pull"]
    wanted += [("scope", scope) for scope in scopes]
    return realm.copy_with(params=[*realm.params.multi_items(), *wanted])


def _login(credentials: Credentials | None) -> Sequence[Pair]:
    if credentials is None:
        return ()
    if credentials.kind is SecretKind.IDENTITY:
        credentials = Credentials(credentials.username or _IDENTITY_USER, credentials.secret)
    return (("Authorization", credentials.basic),)


def _read_token(body: bytes, realm: httpx.URL) -> tuple[str, float]:
    """The token and for how many seconds it is good."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    token = (fields.get("token") or fields.get("access_token")) if isinstance(fields, dict) else None
    if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(token):
        raise _rules.failure(FailureKind.PROTOCOL, realm, "answered with something else than a token")
    seconds = fields.get("expires_in")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        seconds = DEFAULT_SECONDS
    return token, float(min(seconds, MAX_SECONDS))


def _explained(
    error: SourceError, url: httpx.URL, realm: httpx.URL, credentials: Credentials | None
) -> SourceError:
    """What a token server's refusal means for whom it refused."""
    if error.kind is not FailureKind.AUTH:
        return error
    host = login_name(url.netloc.decode("ascii"))
    if credentials is None:
        what = (
            f"gives no token for {_rules.label(url)} without credentials: that is private, or does not exist; "
            f"if it is private, run docker login {host}"
        )
    else:
        what = (
            f"does not accept the credentials that docker's configuration has for {host}; log in again; "
            + _rules.NEW_SECRET
        )
    return _rules.failure(FailureKind.AUTH, realm, what, status=error.status)


def _copy(error: SourceError) -> SourceError:
    """The same for another task: one exception raised in several would collect their tracebacks."""
    return SourceError(
        str(error), kind=error.kind, mirror=error.mirror, status=error.status, retry_after=error.retry_after
    )

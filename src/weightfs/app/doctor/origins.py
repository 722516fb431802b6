"""Asking sources: one ref each, read-only, by their own code and with short bounds, many at a time.

Nothing is pinned or kept. What a source says of its failure is passed on as it is: it knows the way out.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ssl
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

import certifi
import trio

from weightfs.app.doctor import network, probes
from weightfs.app.doctor.verdicts import Verdict, warning
from weightfs.core import hub, oci, ollama
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import RefError, WeightfsError
from weightfs.sources import base_url, open_source
from weightfs.sources.base import FetchSettings

STEP_SECONDS: Final = 5.0  # of connecting, and of response headers
REF_SECONDS: Final = 10.0  # a ref takes a few requests: its revision, its files, a token
DATE_SECONDS: Final = 3.0
MAX_ASKED: Final = 32  # all at once, so that the bound on one is the bound on all
_PORTS: Final = {"http": 80, "https": 443}


async def ask_all(
    fetch: FetchSettings, named: Sequence[str], others: Iterable[str], endpoints: Iterable[str]
) -> tuple[list[Verdict], dict[str, float]]:
    """Verdicts on sources, and by host how far our clock is ahead of it, in seconds.

    Args:
        fetch: How they are reached; the bounds are cut down here.
        named: Refs that are each asked for; a chunk list in `fetch` is theirs.
        others: Refs of which one is asked for at each place.
        endpoints: URLs of APIs that are connected to, if no ref goes there.
    """
    fetch = replace(
        fetch,
        retry=0,
        timeout=min(fetch.timeout, STEP_SECONDS),
        connect_timeout=min(fetch.connect_timeout, STEP_SECONDS),
        stall_timeout=min(fetch.stall_timeout, STEP_SECONDS),
    )
    placed = [(ref, place_of(ref, fetch)) for ref in others]
    chosen, left = network.representatives(named, placed, MAX_ASKED)
    places = {place for place in (place_of(ref, fetch) for ref in chosen) if "://" in place}
    rest = sorted(set(endpoints) - places)
    verdicts: dict[str, Verdict] = {}
    skews: dict[str, float] = {}

    async def ask(ref: str) -> None:
        own = fetch if ref in named else replace(fetch, chunks=None)
        verdicts[ref] = await _ask(parse_ref(ref), own)

    async def reach(url: str) -> None:
        verdicts[url] = await _reach(url, fetch)

    async def compare(url: str) -> None:
        skew = await trio.to_thread.run_sync(_skew, url, fetch, abandon_on_cancel=True)
        if skew is not None:
            skews[network.authority(url)] = skew

    with trio.move_on_after(REF_SECONDS + STEP_SECONDS):
        async with trio.open_nursery() as nursery:
            for ref in chosen:
                nursery.start_soon(ask, ref)
            for url in rest:
                nursery.start_soon(reach, url)
            for url in sorted(places):
                nursery.start_soon(compare, url)
    found = [verdicts.get(key) or network.silent(key, REF_SECONDS) for key in (*chosen, *rest)]
    if left:
        found.append(warning(network.SOURCES, f"{left} more were not asked; name them: weightfs doctor REF…"))
    return found, skews


def place_of(text: str, fetch: FetchSettings) -> str:
    """The origin or API that a ref is asked of; its scheme where it has none of its own."""
    ref = parse_ref(text)
    name = ref.url.partition("://")[2]
    match ref.scheme:
        case "http" | "https":
            return f"{ref.scheme}://{urlsplit(ref.url).netloc}"
        case hub.SCHEME:
            return fetch.hf_endpoint
        case ollama.SCHEME:
            return base_url(ollama.parse_ollama(name).host, fetch)
        case oci.SCHEME:
            return base_url(oci.parse_oci(name).host, fetch)
        case _:
            return ref.scheme


def proxies_of(fetch: FetchSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The proxies that would be used, by scheme. `environment`: as `urllib.request.getproxies` has it."""
    if fetch.proxy is not None:
        return {"http": fetch.proxy, "https": fetch.proxy} if fetch.proxy else {}
    return {scheme: url for scheme, url in environment.items() if scheme in (*_PORTS, "all") and url}


async def look_at_proxies(fetch: FetchSettings) -> list[Verdict]:
    """Whether a connection to each can be had."""
    found = proxies_of(fetch, urllib.request.getproxies())
    reasons: dict[str, str] = {}

    async def reach(scheme: str, url: str) -> None:
        reason = await _connect(url if "://" in url else f"http://{url}")
        if reason is not None:
            reasons[scheme] = reason

    async with trio.open_nursery() as nursery:
        for scheme, url in found.items():
            nursery.start_soon(reach, scheme, url)
    return network.proxies(found, reasons)


async def _ask(ref: Ref, fetch: FetchSettings) -> Verdict:
    name = str(ref)
    with trio.move_on_after(REF_SECONDS):
        try:
            async with contextlib.aclosing(open_source(ref.scheme, fetch)) as source:
                manifest = await source.resolve(ref)
        except WeightfsError as error:
            return network.refused(name, error)
        return network.answered(name, manifest.revision, _credentials(ref, fetch))
    return network.silent(name, REF_SECONDS)


def _credentials(ref: Ref, fetch: FetchSettings) -> str:
    """With what a source is asked, in words."""
    match ref.scheme:
        case hub.SCHEME:
            return "with the token" if fetch.hf_token else "without a token"
        case ollama.SCHEME | oci.SCHEME:
            return (
                f"with what {fetch.docker_config} has for it"
                if fetch.docker_config
                else "without credentials"
            )
        case "http" | "https" if fetch.headers:
            return "with the configured headers"
    return "without credentials"


async def _reach(url: str, fetch: FetchSettings) -> Verdict:
    proxies = proxies_of(fetch, urllib.request.getproxies())
    scheme = urlsplit(url).scheme
    if scheme in proxies or "all" in proxies:
        return network.endpoint(url, None)  # the proxy is looked at by itself
    return network.endpoint(url, await _connect(url))


async def _connect(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)
    except ValueError:
        return "it is not a URL"
    with trio.move_on_after(STEP_SECONDS):  # looking a name up has no bound of its own
        return await trio.to_thread.run_sync(probes.connect, host, port, abandon_on_cancel=True)
    return f"no answer within {STEP_SECONDS:g} s"


def _skew(url: str, fetch: FetchSettings) -> float | None:
    """How far our clock is ahead of the `Date` (RFC 9110, section 6.6.1) of an answer; None if that cannot be had.

    The request goes to the origin's root, and carries nothing. Behind a proxy nobody is asked.
    """
    parts = urlsplit(url)
    if proxies_of(fetch, urllib.request.getproxies()):
        return None
    try:
        connection = _connection(parts.scheme, parts.hostname or "", parts.port, fetch)
        with contextlib.closing(connection):
            connection.request("HEAD", "/", headers={"Connection": "close"})
            said = connection.getresponse().getheader("Date")
        return None if said is None else time.time() - email.utils.parsedate_to_datetime(said).timestamp()
    except (OSError, http.client.HTTPException, ValueError):
        return None  # what is wrong there, the source itself says better


def _connection(scheme: str, host: str, port: int | None, fetch: FetchSettings) -> http.client.HTTPConnection:
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=DATE_SECONDS)
    context = ssl.create_default_context(cafile=fetch.ca_file or certifi.where())
    return http.client.HTTPSConnection(host, port, timeout=DATE_SECONDS, context=context)


def checked(refs: Iterable[str]) -> list[str]:
    """Those that are refs of this version; a cache may know some of a source that is not installed."""
    good = []
    for ref in refs:
        with contextlib.suppress(RefError):
            good.append(str(parse_ref(ref)))
    return good

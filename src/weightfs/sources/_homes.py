"""Where the API behind a ref is, and which origin gets the headers that the user configured. Imports no HTTP library.

Rule for headers: the origin that somebody named, and no other: the host in the ref, or the endpoint configured in its
stead. The Hub and the registries that are meant when no host is said have tokens of their own, and get none of them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from weightfs.core import hub, oci, ollama
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import RefError
from weightfs.sources.base import FetchSettings

# Their names do not say where their API is, or nobody had to write them.
_IMPLIED: Final = frozenset({ollama.DEFAULT_HOST, oci.DOCKER_HUB})
_DEFAULT_HUB: Final = FetchSettings().hf_endpoint
# Hosts whose API is elsewhere.
_API_HOSTS: Final = {oci.DOCKER_HUB: "registry-1.docker.io"}


def home_of(ref: Ref, settings: FetchSettings) -> str | None:
    """A URL at the origin that gets `settings.headers` for `ref`; None if none does."""
    name = ref.url.partition("://")[2]
    match ref.scheme:
        case "http" | "https":
            return ref.url
        case hub.SCHEME:
            return None if settings.hf_endpoint == _DEFAULT_HUB else settings.hf_endpoint
        case ollama.SCHEME:
            return _registry(ollama.parse_ollama(name).host, settings)
        case oci.SCHEME:
            return _registry(oci.parse_oci(name).host, settings)
        case _:
            return None


def base_url(host: str, settings: FetchSettings) -> str:
    """Where a registry's API is: as configured, else https, or http on this machine; without a slash at the end."""
    configured = dict(settings.endpoints).get(host)
    if configured is not None:
        return configured.rstrip("/")
    here = is_loopback(urlsplit(f"//{host}").hostname or "")
    return f"{'http' if here else 'https'}://{_API_HOSTS.get(host, host)}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name or address (W3C Secure Contexts, section 3.1)."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keeps_headers(ref: Ref, settings: FetchSettings, known: Iterable[str]) -> bool:
    """Whether asking what `ref` is sends `settings.headers` to nobody new: to none, or to whom others have named.

    Who looks at a path names a host as well, and may be anybody who may read the mount. Hosts count that the
    configuration places (`endpoints`, `hf_endpoint`), and those of the refs in `known`.
    """
    from weightfs.sources import _rules

    home = home_of(ref, settings)
    if not settings.headers or home is None or ref.scheme == hub.SCHEME:
        return True
    places = {_rules.origin_of(url) for _, url in settings.endpoints}
    return _rules.origin_of(home) in places.union(*(_origins(text, settings) for text in known))


def _origins(text: str, settings: FetchSettings) -> set[str]:
    from weightfs.sources import _rules

    try:
        home = home_of(parse_ref(text), settings)
    except RefError:  # of a source that is not our own
        return set()
    return set() if home is None else {_rules.origin_of(home)}


def _registry(host: str, settings: FetchSettings) -> str | None:
    if host in _IMPLIED and host not in dict(settings.endpoints):
        return None
    return base_url(host, settings)

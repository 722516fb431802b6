"""Where the API behind a ref is, and which origin gets the headers that the user configured. Imports no HTTP library.

Rule for headers: the origin that somebody named, and no other: the host in the ref, or the endpoint configured in its
stead. The Hub and the registries that are meant when no host is said have tokens of their own, and get none of them.
"""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from weightfs.core import hub, oci, ollama
from weightfs.core.ref import Ref
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


def _registry(host: str, settings: FetchSettings) -> str | None:
    if host in _IMPLIED and host not in dict(settings.endpoints):
        return None
    return base_url(host, settings)

"""Which origin gets the headers that the user configured, for a ref.

Rule: the origin that somebody named, and no other: the host in the ref, or the endpoint that was configured in its
stead. The Hub and the registries that are meant when no host is said have tokens of their own, and get none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from weightfs.core import hub, oci, ollama
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import RefError
from weightfs.sources import _rules
from weightfs.sources._registry import base_url
from weightfs.sources.base import FetchSettings

# Their names do not say where their API is, or nobody had to write them.
_IMPLIED: Final = frozenset({ollama.DEFAULT_HOST, oci.DOCKER_HUB})
_DEFAULT_HUB: Final = FetchSettings().hf_endpoint


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


def keeps_headers(ref: Ref, settings: FetchSettings, known: Iterable[str]) -> bool:
    """Whether asking what `ref` is sends `settings.headers` to nobody new: to none, or to whom others have named.

    Who looks at a path names a host as well, and may be anybody who may read the mount. Hosts count that the
    configuration places (`endpoints`, `hf_endpoint`), and those of the refs in `known`.
    """
    home = home_of(ref, settings)
    if not settings.headers or home is None or ref.scheme == hub.SCHEME:
        return True
    places = {_rules.origin_of(url) for _, url in settings.endpoints}
    return _rules.origin_of(home) in places.union(*(_origins(text, settings) for text in known))


def _origins(text: str, settings: FetchSettings) -> set[str]:
    try:
        home = home_of(parse_ref(text), settings)
    except RefError:  # of a source that is not our own
        return set()
    return set() if home is None else {_rules.origin_of(home)}


def _registry(host: str, settings: FetchSettings) -> str | None:
    if host in _IMPLIED and host not in dict(settings.endpoints):
        return None
    return base_url(host, settings)

"""Names in OCI registries: `host/repository[:tag|@sha256:<hex>]`. Pure.

What a repository and a tag may be: distribution specification, "Pulling manifests". The host is always said: which
registry `ai/smollm2` means depends on whom you ask. Rule: `parse_oci(str(name)) == name`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from weightfs.core.hosts import is_authority
from weightfs.errors import RefError

SCHEME: Final = "oci"
DEFAULT_TAG: Final = "latest"
DOCKER_HUB: Final = "docker.io"
DOCKER_HUB_ALIASES: Final = frozenset({"index.docker.io", "registry-1.docker.io"})

_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:]{2,45}\])(?::[0-9]{1,5})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?=.{{1,255}}$){_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FORM = "write host/name[:tag], or host/name@sha256:<64 lower-case hex digits>"


@dataclass(frozen=True, slots=True)
class OciName:
    """A repository and what of it: `reference` is a tag or `sha256:<hex>`."""

    host: str
    repository: str
    reference: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}{'@' if self.by_digest else ':'}{self.reference}"

    @property
    def by_digest(self) -> bool:
        """Whether the name itself says which bytes the manifest has."""
        return ":" in self.reference

    @property
    def tree(self) -> str:
        """The directory below `models/`."""
        return f"{SCHEME}/{self.host}/{self.repository}/{self.reference.replace(':', '-')}"


def parse_oci(text: str) -> OciName:
    """Read a name, without `oci://`. RefError."""
    host, slash, rest = text.partition("/")
    host = DOCKER_HUB if host.lower() in DOCKER_HUB_ALIASES else host.lower()
    if not slash or not (host == "localhost" or re.search("[.:]", host)):
        raise RefError(f"{text[:200]!r} does not say which registry, as in docker.io/ai/smollm2; {_FORM}.")
    if not _HOST.fullmatch(host) or not is_authority(host):
        raise RefError(f"{host[:100]!r} cannot be the host of a registry; {_FORM}.")
    repository, at, digest = rest.partition("@")
    reference = digest
    if at:
        if ":" in repository:
            raise RefError(f"{text[:200]!r} has a tag and a digest; keep one of them.")
        if not _DIGEST.fullmatch(digest):
            raise RefError(f"{digest[:100]!r} is not a digest that weightfs can check; {_FORM}.")
    else:
        repository, colon, tag = rest.partition(":")
        reference = tag if colon else DEFAULT_TAG
        if not _TAG.fullmatch(reference):
            raise RefError(f"{reference[:150]!r} cannot be a tag; {_FORM}.")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository):
        raise RefError(f"{repository[:100]!r} cannot be a repository (lower case, no empty part); {_FORM}.")
    return OciName(host, repository, reference)

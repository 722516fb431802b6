"""Names of models in Ollama registries: `[host/][namespace/]model[:tag]`. Pure.

Rules: `parse_ollama(str(name)) == name`; defaults are left out of the text where Ollama would put them back, but for
the tag, which is always said. Ollama matches names without regard to case, and so does `same_name`; the case is kept
as typed, since other registries that speak its protocol (hf.co) may care.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from weightfs.core.hosts import is_authority
from weightfs.errors import RefError

SCHEME: Final = "ollama"
DEFAULT_HOST: Final = "registry.ollama.ai"
DEFAULT_NAMESPACE: Final = "library"
DEFAULT_TAG: Final = "latest"

# What Ollama takes (types/model/name.go): a part begins with a letter, a digit or "_", and has at most 80 characters.
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})(?::[0-9]{1,5})?")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_TAG = _MODEL


@dataclass(frozen=True, slots=True)
class OllamaName:
    """All four parts, as Ollama completes them."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        text = f"{self.model}:{self.tag}"
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{text}"
        return text if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/{text}"

    @property
    def path(self) -> str:
        """`host/namespace/model/tag`: where Ollama keeps the manifest, below `manifests/`."""
        return f"{self.host}/{self.namespace}/{self.model}/{self.tag}"

    @property
    def tree(self) -> str:
        """The directory below `models/`: the default host is left out, as it is in the name."""
        path = self.path.removeprefix(f"{DEFAULT_HOST}/")
        return f"{SCHEME}/{path}"


def parse_ollama(text: str) -> OllamaName:
    """Read a name, without `ollama://`. RefError."""
    head, slash, last = text.rpartition("/")
    model, colon, tag = last.partition(":")
    parts = head.split("/") if slash else []
    if len(parts) > 2 or (colon and not tag):
        raise RefError(f"{text[:200]!r} is no name of an Ollama model; write [host/][namespace/]model[:tag].")
    namespace = parts[-1] if parts else DEFAULT_NAMESPACE
    host = parts[0].lower() if len(parts) == 2 else DEFAULT_HOST
    tag = tag or DEFAULT_TAG
    for what, part, rule in (
        ("host", host, _HOST),
        ("namespace", namespace, _NAMESPACE),
        ("model", model, _MODEL),
        ("tag", tag, _TAG),
    ):
        if not rule.fullmatch(part) or (what == "host" and not is_authority(part)):
            raise RefError(
                f"{part[:100]!r} cannot be the {what} of an Ollama model; write [host/][namespace/]model[:tag]."
            )
    return OllamaName(host, namespace, model, tag)

"""`WWW-Authenticate`: what a server wants before it answers (RFC 9110 sections 11.2, 11.6.1). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_HEADER_CHARS = 16 * 1024

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105  RFC 9110 section 5.6.2, no password
_PARAMETER = re.compile(rf'[\s,]*({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))(?=[\s,]|$)')
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|$)")
_TOKEN68 = re.compile(r"[ \t]+[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|$)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme with its parameters; scheme and names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """The challenges of a header, several lines of it joined by commas; those before the first fault."""
    return tuple(_challenges(header[:MAX_HEADER_CHARS]))


def _challenges(header: str) -> Iterator[Challenge]:
    at = 0
    while found := _SCHEME.match(header, at):
        at = found.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, at):
            name, quoted, plain = parameter.groups()
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(name.lower(), value)
            at = parameter.end()
        if not parameters and (blob := _TOKEN68.match(header, at)):
            at = blob.end()
        yield Challenge(found[1].lower(), parameters)

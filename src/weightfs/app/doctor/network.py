"""Verdicts on proxies and sources: pure functions of what was asked and answered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from weightfs.app.doctor.verdicts import Verdict, ok, problem, warning
from weightfs.errors import FailureKind, SourceError, WeightfsError
from weightfs.logs import one_line, redact

# Kinds that mend themselves: the mount goes on asking.
_PASSING: Final = frozenset({FailureKind.BUSY})
_NO_WAY: Final = frozenset({FailureKind.CONNECT, FailureKind.TIMEOUT, FailureKind.STALL, FailureKind.RESET})
SOURCES: Final = "sources"


def proxies(found: Mapping[str, str], unreachable: Mapping[str, str]) -> list[Verdict]:
    """By scheme, the proxies that are set; of those that did not answer, by scheme, the reason."""
    name = "proxy"
    if not found:
        return [ok(name, "none is set: sources are asked directly")]
    verdicts = []
    for scheme, url in sorted(found.items()):
        where = f"{authority(url)} (for {scheme})"
        if scheme in unreachable:
            text = f"{where} cannot be reached: {unreachable[scheme]}; correct proxy, or {scheme}_proxy, or unset it"
            verdicts.append(problem(name, text))
        else:
            verdicts.append(ok(name, f"{where} can be reached"))
    return verdicts


def answered(ref: str, revision: str, how: str) -> Verdict:
    """A source said what the ref is; `how`: with which credentials it was asked."""
    return ok(SOURCES, _plain(f"{ref} is there, at revision {revision[:40]} ({how})"))


def refused(ref: str, error: WeightfsError) -> Verdict:
    """A source gave an error, whose own sentence says the way out."""
    text = str(error).strip().removesuffix(".")
    if ref not in text:
        text = f"{ref}: {text}"
    if isinstance(error, SourceError):
        if error.kind is FailureKind.TLS:
            text += " (a private certificate authority is named with ca-file; a wrong clock looks the same)"
        if error.kind in _NO_WAY:
            text += "; look at the network, DNS and the proxy, and whether the server runs"
        if error.kind in _PASSING:
            return warning(SOURCES, _plain(text))
    return problem(SOURCES, _plain(text))


def silent(ref: str, seconds: float) -> Verdict:
    """No answer within the bound."""
    return problem(
        SOURCES,
        _plain(f"{ref} was not answered for within {seconds:g} s: look at the network, DNS and the proxy"),
    )


def endpoint(url: str, reason: str | None) -> Verdict:
    """An endpoint that no ref goes to; `reason`: why it cannot be reached."""
    if reason is None:
        return ok(
            SOURCES,
            _plain(f"{url} can be reached; `weightfs doctor REF` asks it for a model, with its token"),
        )
    return problem(
        SOURCES, _plain(f"{url} cannot be reached: {reason}; correct the endpoint, or the network to it")
    )


def representatives(
    named: Sequence[str], others: Iterable[tuple[str, str]], limit: int
) -> tuple[list[str], int]:
    """Which refs are asked for: all that were named, and of the others one of each place; at most `limit`.

    `others` are (ref, place). Returns the refs, and how many had no room.
    """
    chosen = dict.fromkeys(named)
    places: set[str] = set()
    for ref, place in others:
        if place not in places:
            places.add(place)
            chosen.setdefault(ref)
    return list(chosen)[:limit], max(0, len(chosen) - limit)


def authority(url: str) -> str:
    """Host and port of a URL, without what may be secret: a password may be written wrongly, with a slash in it."""
    return re.split(r"[/?#]", url.rpartition("://")[2].rpartition("@")[2], maxsplit=1)[0]


def _plain(text: str) -> str:
    return one_line(redact(text))

"""More places for the same bytes, by URL prefix: what `[[mirror]]` in the configuration says.

Rule: only the path is carried over. The query of an origin's URL may be a secret, and it would mean nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightfs.core.manifest import MAX_MIRRORS, Blob, Mirror


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """A URL that begins with `prefix` has a twin at `url` and the rest; lower `priority` is asked first."""

    prefix: str
    url: str
    priority: int = 1


def with_twins(blob: Blob, rules: Sequence[PrefixRule]) -> Blob:
    """`blob` with the twins of its mirrors, at most `MAX_MIRRORS` in all.

    A blob without digests is returned as it is: nothing would tell a twin's other version from the right one.
    """
    if not rules or (not blob.digest and blob.chunk_list is None):
        return blob
    known = {mirror.url for mirror in blob.mirrors}
    twins = [
        Mirror(rule.url + mirror.url.partition("?")[0][len(rule.prefix) :], rule.priority)
        for mirror in blob.mirrors
        for rule in rules
        if mirror.url.partition("?")[0].startswith(rule.prefix)
    ]
    new: dict[str, Mirror] = {}
    for twin in twins:
        if twin.url not in known:
            new.setdefault(twin.url, twin)
    if not new:
        return blob
    return blob.with_mirrors((*blob.mirrors, *new.values())[:MAX_MIRRORS])

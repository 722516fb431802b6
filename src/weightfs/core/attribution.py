"""Whose fault it was that bytes were wrong: the wire's, the disk's or the origin's.

The rule:

- wire: a fetched chunk differed from the digest that binds it, and these wrong bytes came once. Chance does that,
  or whatever stands between.
- origin: the same wrong bytes of a chunk came again, from the same mirror or from another one; or every chunk is as it
  came, and the digest of the whole is not the promised one; or a chunk of such a whole was had right from elsewhere.
- disk: bytes that were right when they landed differ when they are read again, or are gone.

What is remembered to know wrong bytes again is bounded; the counts are not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

MAX_REMEMBERED = 1024  # wrong chunks of one blob: 100 KiB at most


class Cause(enum.StrEnum):
    """Who spoilt bytes."""

    WIRE = "wire"
    DISK = "disk"
    ORIGIN = "origin"


@dataclass(frozen=True, slots=True)
class FaultCounts:
    """Chunks that were wrong, by cause. A whole whose digest is wrong counts as one of the origin."""

    wire: int = 0
    disk: int = 0
    origin: int = 0

    def __add__(self, other: FaultCounts) -> FaultCounts:
        return FaultCounts(self.wire + other.wire, self.disk + other.disk, self.origin + other.origin)

    def __bool__(self) -> bool:
        return self != _NONE

    def __str__(self) -> str:
        return f"wire={self.wire} disk={self.disk} origin={self.origin}"


_NONE = FaultCounts()


class Attribution:
    """The faults of one blob. Mirrors are named by their numbers."""

    def __init__(self) -> None:
        self._seen: dict[
            tuple[int, bytes], int | None
        ] = {}  # mirror of a fault that counts as the wire's still
        self._mirrors: dict[int, FaultCounts] = {}
        self._others = _NONE

    def mismatched(self, mirror: int, chunk: int, digest: bytes) -> Cause:
        """A fetched chunk was wrong. What was thought to be the wire's fault becomes the origin's if it comes again."""
        key = (chunk, digest)
        if key not in self._seen:
            if len(self._seen) >= MAX_REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = mirror
            self._count(mirror, wire=1)
            return Cause.WIRE
        if (first := self._seen[key]) is not None:
            self._seen[key] = None
            self._count(first, wire=-1, origin=1)
        self._count(mirror, origin=1)
        return Cause.ORIGIN

    def lost(self, chunks: int) -> None:
        """The disk did not keep so many chunks."""
        self._others = replace(self._others, disk=self._others.disk + chunks)

    def refuted(self, mirror: int | None = None) -> None:
        """The digest of the whole is wrong; or, of a mirror, one of its chunks that was had right from elsewhere."""
        if mirror is None:
            self._others = replace(self._others, origin=self._others.origin + 1)
        else:
            self._count(mirror, origin=1)

    def of_mirror(self, mirror: int) -> FaultCounts:
        """Its faults."""
        return self._mirrors.get(mirror, _NONE)

    @property
    def counts(self) -> FaultCounts:
        """All of them."""
        return sum(self._mirrors.values(), self._others)

    def _count(self, mirror: int, *, wire: int = 0, origin: int = 0) -> None:
        self._mirrors[mirror] = self.of_mirror(mirror) + FaultCounts(wire, 0, origin)

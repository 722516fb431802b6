"""What to take out of the cache, and in which order. Pure: snapshots, a number of bytes and the time in; a plan out.

Rules, held under Hypothesis in tests/core/test_eviction.py:

- What is exempt (pinned, or in use) is never taken.
- Blobs go by their last use, the longest unused first. Of a blob that may go in parts, the parts go by their last use;
  of parts that are equally old the later ones, for runtimes read the head first. Equal blobs go by id: the same
  question has the same answer.
- What has not been used for longer than `max_age` goes, whether room is wanted or not.
- For the sake of room no more goes than is wanted, and one unit: the last unit was needed.
- A last use in the future (the clock jumped back) counts as a use now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId


@dataclass(frozen=True, slots=True)
class Run:
    """Present chunks that may go by themselves. `used`: seconds since 1970."""

    chunks: ChunkSpan
    nbytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A blob that has room in the cache: `nbytes` are freed if it goes whole, `used` is its last use.

    `runs` are the parts that it may go in; empty if it may only go whole.
    """

    blob: BlobId
    nbytes: int
    used: float
    pinned: bool = False
    in_use: bool = False
    runs: tuple[Run, ...] = ()

    @property
    def exempt(self) -> bool:
        """Not to be taken, whatever is wanted."""
        return self.pinned or self.in_use


@dataclass(frozen=True, slots=True)
class Eviction:
    """Take these `chunks` of a blob (None: all of it, with its file). `idle`: seconds since its last use."""

    blob: BlobId
    chunks: tuple[ChunkSpan, ...] | None
    nbytes: int
    idle: float
    aged: bool = False  # for its age, not for room


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """What to take, in this order. `missing`: bytes that were wanted and cannot be had."""

    evictions: tuple[Eviction, ...]
    missing: int

    @property
    def nbytes(self) -> int:
        """Bytes that the whole plan frees."""
        return sum(eviction.nbytes for eviction in self.evictions)


def plan_evictions(
    candidates: Iterable[Candidate], *, wanted: int, now: float, max_age: float | None = None
) -> EvictionPlan:
    """Free `wanted` bytes (0 or less: none), and all that was not used for over `max_age` seconds.

    Each blob is among `candidates` at most once; `now` is in seconds since 1970.
    """
    free = [one for one in candidates if not one.exempt and one.nbytes > 0]
    free.sort(key=lambda one: (min(one.used, now), one.blob.raw))
    evictions: list[Eviction] = []
    for one in free:
        idle = max(0.0, now - one.used)
        if max_age is not None and idle > max_age:
            evictions.append(Eviction(one.blob, None, one.nbytes, idle, aged=True))
            wanted -= one.nbytes
        elif wanted > 0:
            evictions.append(_part(one, wanted, idle, now) if one.runs else _whole(one, idle))
            wanted -= evictions[-1].nbytes
        else:
            break  # the younger ones are not older than `max_age` either
    return EvictionPlan(tuple(evictions), max(0, wanted))


def _whole(one: Candidate, idle: float) -> Eviction:
    return Eviction(one.blob, None, one.nbytes, idle)


def _part(one: Candidate, wanted: int, idle: float, now: float) -> Eviction:
    """As many runs as are wanted, the oldest first."""
    taken: list[Run] = []
    freed = 0
    for run in sorted(one.runs, key=lambda run: (min(run.used, now), -run.chunks.start)):
        if freed >= wanted:
            return Eviction(one.blob, tuple(_joined(taken)), freed, idle)
        taken.append(run)
        freed += run.nbytes
    return Eviction(one.blob, tuple(_joined(taken)), freed, idle)


def _joined(runs: list[Run]) -> Iterator[ChunkSpan]:
    """Their spans, ascending; those that touch are one."""
    start = stop = -1
    for span in sorted(run.chunks for run in runs):
        if span.start == stop:
            stop = span.stop
            continue
        if start >= 0:
            yield ChunkSpan(start, stop)
        start, stop = span.start, span.stop
    yield ChunkSpan(start, stop)

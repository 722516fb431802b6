"""The planner's word on single chunks: where each is, and what it waits for. It only looks; nothing is changed.

For logs, `weightfs debug inflight` and people: a chunk that somebody waits for is in exactly one of `ChunkState`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weightfs.core.geometry import ChunkSpan
from weightfs.core.plan import Failure
from weightfs.core.planledger import BlobPlan, Ledger


class ChunkState(enum.StrEnum):
    """What holds a chunk, or keeps it from being fetched."""

    PRESENT = "present"
    FETCHING = "fetching"
    DROPPING = "dropping"  # taken away, and not yet out of index and file
    GIVEN_UP = "given up"  # it, or its blob, for a while
    PUT_OFF = "put off"  # the mirrors left for it named a later time
    PAUSED = "paused"  # its blob, between two rounds of tries
    BLOCKED = "blocked"  # by fetches that must end first
    NO_ROOM = "no room"  # it does not fit into the cache
    QUEUED = "queued"  # behind others, or for a slot
    UNASKED = "unasked"


@dataclass(frozen=True, slots=True)
class ChunkWord:
    """One chunk. Times in seconds: `age` of its fetch, `rest` until it may be tried again."""

    chunk: int
    state: ChunkState
    waiters: int = 0
    job: int | None = None
    mirror: str = ""
    age: float | None = None
    rest: float | None = None
    why: str = ""


def chunk_words(ledger: Ledger, blob: BlobPlan, span: ChunkSpan, now: float) -> tuple[ChunkWord, ...]:
    """Of each chunk of `span`, at monotonic time `now`."""
    return tuple(_word(ledger, blob, chunk, now) for chunk in span)


def _word(ledger: Ledger, blob: BlobPlan, chunk: int, now: float) -> ChunkWord:
    waiters = len(blob.waiting.get(chunk, ()))
    if chunk in blob.present:
        return ChunkWord(chunk, ChunkState.PRESENT, waiters)
    if chunk in blob.owner:
        job = ledger.jobs[blob.owner[chunk]]
        mirror = blob.mirrors[job.mirror].url
        return ChunkWord(chunk, ChunkState.FETCHING, waiters, job.id, mirror, now - job.started)
    if chunk in blob.punching:
        return ChunkWord(chunk, ChunkState.DROPPING, waiters)
    if given_up := blob.failed or blob.held.get(chunk):
        return _given_up(chunk, waiters, given_up, now)
    if chunk in blob.parked:
        return ChunkWord(chunk, ChunkState.PUT_OFF, waiters, rest=max(0.0, blob.parked[chunk] - now))
    return _untaken(ledger, blob, chunk, waiters, now)


def _given_up(chunk: int, waiters: int, given_up: tuple[float, Failure], now: float) -> ChunkWord:
    until, failure = given_up
    rest = max(0.0, until - now)
    return ChunkWord(chunk, ChunkState.GIVEN_UP, waiters, mirror=failure.mirror, rest=rest, why=failure.text)


def _untaken(ledger: Ledger, blob: BlobPlan, chunk: int, waiters: int, now: float) -> ChunkWord:
    if not waiters:
        return ChunkWord(chunk, ChunkState.UNASKED)
    if blob.ghosts or blob.draining:
        return ChunkWord(chunk, ChunkState.BLOCKED, waiters)
    if blob.retry_at > now:
        mirror, why = (blob.trouble.mirror, blob.trouble.text) if blob.trouble is not None else ("", "")
        return ChunkWord(chunk, ChunkState.PAUSED, waiters, mirror=mirror, rest=blob.retry_at - now, why=why)
    if blob in ledger.room.short:
        return ChunkWord(chunk, ChunkState.NO_ROOM, waiters)
    why = f"{len(ledger.jobs)} of {ledger.limits.max_jobs} jobs run"
    return ChunkWord(chunk, ChunkState.QUEUED, waiters, why=why)

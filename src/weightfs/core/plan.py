"""The words that the planner and its driver speak: events in, commands out. Data only.

The driver (`engine.fetcher`) feeds every event with the monotonic time in seconds, and carries out the commands in
order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MIB, BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.errors import FailureKind


class Priority(enum.IntEnum):
    """Lower goes first: what a reader waits for, what it will want next, what nobody has asked for yet."""

    DEMAND = 0
    READAHEAD = 1
    FILL = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a fetch failed: `text` is one sentence for people; `retry_after` in seconds, if the origin named a time."""

    kind: FailureKind
    text: str
    mirror: str = ""
    retry_after: float | None = None
    chunk: int = -1


# ---- events


@dataclass(frozen=True, slots=True)
class Added:
    """A blob the planner shall know; `present` is what may be read already. The planner keeps `present` as its own.

    `kept`: chunks that are not present, and have their room in the file all the same.
    """

    blob: BlobId
    shape: BlobShape
    mirrors: tuple[Mirror, ...]
    present: ChunkSet
    kept: Iterable[int] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """Forget the blob: jobs are stopped, waiters woken with CANCELLED."""

    blob: BlobId


@dataclass(frozen=True, slots=True)
class Remirrored:
    """The blob has these mirrors too; past faults are forgotten.

    Mirrors keep their numbers: one of a known URL takes the place of the old one, for its priority or validator may be
    another; those with a new URL are appended, none is taken away.
    """

    blob: BlobId
    mirrors: tuple[Mirror, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """A reader waits for all of `span`. Answered by exactly one `Wake`, unless `Withdrawn` first."""

    waiter: int
    blob: BlobId
    span: ChunkSpan


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The reader has gone away. Its fetches go on: no byte on its way is thrown away."""

    waiter: int


@dataclass(frozen=True, slots=True)
class Want:
    """Read-ahead: nobody waits yet. Old wants of a blob give way to newer ones."""

    blob: BlobId
    span: ChunkSpan


@dataclass(frozen=True, slots=True)
class Fill:
    """Switch background fill of a blob on or off. On, it goes on for what is dropped later, too."""

    blob: BlobId
    on: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Hold the background fill of a blob back, or let it go on; `Fill` keeps its meaning. Readers do not notice.

    Requests with a range are short, and end by themselves; a stream of the whole that nobody waits for is stopped.
    """

    blob: BlobId
    on: bool


@dataclass(frozen=True, slots=True)
class Landed:
    """The chunk is verified, written and visible."""

    job: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Durable:
    """`nbytes` of landed chunks are now on disk and in the index."""

    blob: BlobId
    nbytes: int


@dataclass(frozen=True, slots=True)
class Undone:
    """`nbytes` of landed chunks will not become durable: they are dropped or, with a `failure`, the cache refused them.

    Then the blob is held, each time for longer until something of it is `Durable`: fetching what cannot be kept again
    and again would be for nothing. To be fed before the chunks are `Dropped`.
    """

    blob: BlobId
    nbytes: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Refuted:
    """The whole is wrong: of each of these chunks the mirror, by number, that gave it. Others are asked from now on."""

    blob: BlobId
    sources: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Mismatched:
    """The chunk's digest was not the trusted one; nothing was written; the job goes on with the next chunk."""

    job: int
    chunk: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Answer to `Trim`: the job will not touch chunks from `stop` on."""

    job: int
    stop: int


@dataclass(frozen=True, slots=True)
class Done:
    """The job ended well; what it neither landed nor mismatched is free again."""

    job: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended badly, and touches nothing any more. `jitter` in [0, 1)."""

    job: int
    failure: Failure
    jitter: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """These chunks are no longer to be read: evicted, or found bad on disk. Nobody may write them before `Punched`."""

    blob: BlobId
    chunks: Iterable[int]


@dataclass(frozen=True, slots=True)
class Punched:
    """The index and the file have forgotten the dropped chunks: they may be fetched.

    `freed`: their room was given back. Else it stays theirs, and who lands there needs no more.
    """

    blob: BlobId
    chunks: Iterable[int]
    freed: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """The bytes that chunks may take from now on: present, in flight, and kept ones together. None: no bound.

    Nothing is fetched that would go beyond `demand`; read-ahead and fill stop at `background` already.
    """

    demand: int | None
    background: int | None


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The answer to `NeedRoom`: no more can be had now. Readers of what does not fit are told; background waits."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Background:
    """Whether read-ahead and fill may begin jobs. What is in flight goes on, what waits in line stays there."""

    on: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the answer to `SleepUntil`."""


JobEvent = Landed | Mismatched | Trimmed | Done | Failed
BlobEvent = Remirrored | Need | Want | Fill | Pause | Durable | Undone | Refuted | Dropped | Punched
Event = JobEvent | BlobEvent | Added | Removed | Withdrawn | Tick | Capacity | NoRoom | Background

# ---- commands


@dataclass(frozen=True, slots=True)
class Fetch:
    """Start a job: fetch `span` from mirror number `mirror`.

    `whole`: a stream from byte 0 without ranges, of which only the chunks in `wanted` may be written.
    """

    job: int
    blob: BlobId
    span: ChunkSpan
    mirror: int
    priority: Priority
    whole: bool = False
    wanted: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Trim:
    """Ask the job to end before chunk `at`; answered by `Trimmed` (or by the job's end)."""

    job: int
    at: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the job as soon as can be; answered by `Failed(CANCELLED)` or `Done`."""

    job: int


@dataclass(frozen=True, slots=True)
class Wake:
    """The waiter's chunks are all visible, or, with a failure, cannot be had now."""

    waiter: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Chunk `failure.chunk` (-1: the whole blob) will not be tried again before `until`. For logs and for `pull`."""

    blob: BlobId
    failure: Failure
    until: float


@dataclass(frozen=True, slots=True)
class SleepUntil:
    """Feed a `Tick` at this time, if not before."""

    time: float


@dataclass(frozen=True, slots=True)
class NeedRoom:
    """Something of the blob does not fit into the `Capacity`, and waits. Said once, until there is more room or less.

    `Planner.short` says what is missing. Answered by `Capacity`, by `Punched(freed=True)`, or by `NoRoom`.
    """

    blob: BlobId
    priority: Priority


Command = Fetch | Trim | Stop | Wake | GaveUp | NeedRoom | SleepUntil


@dataclass(frozen=True, slots=True)
class Limits:
    """The planner's bounds. Bytes count what was asked of origins and is not yet durable."""

    max_jobs: int = 32
    # Read-ahead and fill together never take the last slots: max_jobs - background_jobs are demand's own.
    background_jobs: int = 12
    # While a reader waits, fill keeps no more than these, so that a thin line serves the reader.
    fill_jobs_under_demand: int = 2
    # One request's bytes at most, and the seconds that a fill request should last: short enough to let demand pass.
    job_bytes: int = 8 * MIB
    fill_job_seconds: float = 1.0
    # What a crash may cost per blob: the promise of docs/semantics.md. Background stops earlier: room for demand.
    unsettled_bytes: int = 64 * MIB
    background_unsettled_bytes: int = 48 * MIB
    # In flight over all blobs, the global budget of read-ahead and fill; demand is never refused for it. A whole stream
    # (an origin without ranges) cannot be cut to a size: it counts for neither this bound nor the one above.
    budget_bytes: int = 256 * MIB
    # A demanded chunk that stands behind so many chunks of a job for which nobody waits is taken out of it.
    trim_distance: int = 2
    backoff_base: float = 0.5
    backoff_cap: float = 30.0
    # None: transient faults are retried until the reader's own bound; N: give up after N retries in a row (--retry).
    max_retries: int | None = None
    # A chunk or blob that was given up, or a mirror that is not to be asked, is left alone for so long (seconds);
    # doubles with each time up to the cap.
    hold_base: float = 5.0
    hold_cap: float = 300.0
    # Wrong digests from one mirror for one chunk before that mirror is not asked for it for the time of a hold.
    mismatches_per_mirror: int = 2
    # Answers in a row that break the protocol before a mirror is not asked for the time of a hold.
    protocol_strikes: int = 3
    # A fill request while the line's speed is unknown.
    first_job_bytes: int = 2 * MIB

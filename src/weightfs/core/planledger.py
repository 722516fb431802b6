"""The planner's books: which chunk is present, in a job, held, awaited or wanted. No policy: `Ledger` moves chunks.

Invariants (`Ledger.check` states them as sentences):

- `taken` is exactly: present, in a job, held, or being punched. What is not taken may be fetched.
- A chunk is in at most one job, and in none while it is present.
- A chunk that somebody waits for is not present, and is taken or in the queue of demand.
- The bytes in flight are those of the chunks in jobs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.mirrors import MirrorBoard
from weightfs.core.plan import Failure, Limits, Priority


@dataclass(slots=True)
class Job:
    """One fetch in flight. `nbytes` have not landed yet; times are monotonic seconds."""

    id: int
    blob: BlobId
    mirror: int
    priority: Priority
    started: float
    outstanding: set[int]
    nbytes: int
    whole: bool = False
    trimming: bool = False
    landed_bytes: int = 0


@dataclass(slots=True)
class BlobPlan:
    """All that is known of one blob."""

    id: BlobId
    shape: BlobShape
    present: ChunkSet
    taken: ChunkSet  # present, in a job, held, or being punched
    mirrors: tuple[Mirror, ...]
    board: MirrorBoard
    owner: dict[int, int] = field(default_factory=dict)  # chunk → job
    waiting: dict[int, set[int]] = field(default_factory=dict)  # chunk → waiters
    demand: dict[int, None] = field(default_factory=dict)  # wanted by waiters, not taken; in order of arrival
    wants: list[ChunkSpan] = field(default_factory=list)
    fill: bool = False
    cursor: int = 0  # where fill goes on: behind the last reader
    punching: set[int] = field(default_factory=set)  # dropped, and not yet out of index and file
    inflight: int = 0
    undurable: int = 0
    # faults
    attempt: int = 0
    last_failure: float = float("-inf")
    retry_at: float = float("-inf")
    dead: dict[int, Failure] = field(
        default_factory=dict
    )  # mirrors not to be asked before the blob's hold ends
    strikes: dict[int, int] = field(default_factory=dict)
    streamers: set[int] = field(default_factory=set)  # mirrors without ranges
    mismatches: dict[int, dict[int, int]] = field(default_factory=dict)  # chunk → mirror → count
    held: dict[int, tuple[float, Failure]] = field(default_factory=dict)
    holds: dict[int, int] = field(default_factory=dict)  # chunk (-1: the blob) → how often it was given up
    failed: tuple[float, Failure] | None = None
    stream_rate: float = 0.0  # bytes/s of one job, smoothed

    @property
    def unsettled(self) -> int:
        """Bytes asked of origins that are not durable yet."""
        return self.inflight + self.undurable

    def chunk_bytes(self, chunk: int) -> int:
        """The length of one chunk."""
        return len(self.shape.span_of(chunk))


@dataclass(slots=True)
class Waiter:
    """A reader, and which of its chunks are not visible yet."""

    blob: BlobId
    missing: set[int]


class Ledger:
    """Blobs, jobs and waiters, and every move of a chunk between them. `out` gathers the commands of one event."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blobs: dict[BlobId, BlobPlan] = {}
        self.jobs: dict[int, Job] = {}
        self.waiters: dict[int, Waiter] = {}
        self.filling: dict[BlobId, None] = {}  # in line for fill, first served first
        self.active: dict[BlobId, None] = {}  # blobs with anything to schedule or to wait for
        self.inflight = 0
        self.out: list[plan.Command] = []
        self._next_job = 1

    def issue(self, blob: BlobPlan, span: ChunkSpan, chunks: frozenset[int], job: Job) -> None:
        """Put `chunks` into a new job, and ask for `span`."""
        self.jobs[job.id] = job
        self.inflight += job.nbytes
        blob.inflight += job.nbytes
        for chunk in chunks:
            blob.owner[chunk] = job.id
            blob.taken.add(chunk)
            blob.demand.pop(chunk, None)
        wanted = chunks if job.whole else frozenset()
        self.out.append(plan.Fetch(job.id, blob.id, span, job.mirror, job.priority, job.whole, wanted))

    def new_job(
        self,
        blob: BlobPlan,
        chunks: frozenset[int],
        mirror: int,
        priority: Priority,
        now: float,
        *,
        whole: bool,
    ) -> Job:
        """A job with the next number."""
        nbytes = sum(blob.chunk_bytes(chunk) for chunk in chunks)
        job = Job(self._next_job, blob.id, mirror, priority, now, set(chunks), nbytes, whole)
        self._next_job += 1
        return job

    def leave(self, job: Job, chunk: int) -> int:
        """Take a chunk out of its job (not yet out of `taken`); its bytes."""
        job.outstanding.discard(chunk)
        blob = self.blobs.get(job.blob)
        if blob is None:
            return 0
        nbytes = blob.chunk_bytes(chunk)
        job.nbytes -= nbytes
        blob.inflight -= nbytes
        self.inflight -= nbytes
        del blob.owner[chunk]
        return nbytes

    def free(self, job: Job, chunks: Iterable[int]) -> None:
        """Give chunks of a job back."""
        for chunk in sorted(chunks):
            self.leave(job, chunk)
            if (blob := self.blobs.get(job.blob)) is not None:
                self.available(blob, chunk)

    def end(self, job: Job, now: float) -> None:
        """The job is over: what it did not land is free again."""
        del self.jobs[job.id]
        blob = self.blobs.get(job.blob)
        self.free(job, list(job.outstanding))
        if blob is None:
            self.inflight -= job.nbytes
        elif job.landed_bytes and now > job.started:
            rate = job.landed_bytes / (now - job.started)
            blob.stream_rate = rate if not blob.stream_rate else 0.7 * blob.stream_rate + 0.3 * rate

    def available(self, blob: BlobPlan, chunk: int) -> None:
        """The chunk is nobody's: to the queue of demand if somebody waits, else to whoever wants it."""
        blob.taken.discard(chunk)
        if chunk in blob.waiting:
            blob.demand[chunk] = None
            self.active[blob.id] = None
        if blob.fill:
            blob.cursor = min(blob.cursor, chunk)

    def forget_waiter(self, waiter: int) -> None:
        """The reader is answered, or has gone."""
        entry = self.waiters.pop(waiter, None)
        if entry is None:
            return
        blob = self.blobs[entry.blob]
        for chunk in entry.missing:
            waiters = blob.waiting.get(chunk)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del blob.waiting[chunk]
                    blob.demand.pop(chunk, None)

    def wake_visible(self, blob: BlobPlan, chunk: int) -> None:
        """Wake who waited for nothing but this chunk."""
        blob.demand.pop(chunk, None)
        for waiter in blob.waiting.pop(chunk, ()):
            missing = self.waiters[waiter].missing
            missing.discard(chunk)
            if not missing:
                del self.waiters[waiter]
                self.out.append(plan.Wake(waiter))

    def wake_failed(self, blob: BlobPlan, chunks: Iterable[int], failure: Failure) -> None:
        """Tell everybody who waits for one of `chunks`."""
        for waiter in {waiter for chunk in chunks for waiter in blob.waiting.get(chunk, ())}:
            self.forget_waiter(waiter)
            self.out.append(plan.Wake(waiter, failure))

    def set_fill(self, blob: BlobPlan, on: bool) -> None:
        """Put the blob in line for fill, or take it out."""
        blob.fill = on
        if on:
            self.filling.setdefault(blob.id)
            self.active[blob.id] = None
        else:
            self.filling.pop(blob.id, None)

    def active_blobs(self) -> list[BlobPlan]:
        """Those with anything to schedule or to wait for."""
        return [self.blobs[blob] for blob in self.active]

    def check(self) -> list[str]:
        """Sentences about broken invariants; empty if all is well."""
        return [problem for blob in self.blobs.values() for problem in self._check_blob(blob)]

    def _check_blob(self, blob: BlobPlan) -> Iterable[str]:
        for chunk, job_id in blob.owner.items():
            if chunk in blob.present:
                yield f"chunk {chunk} of {blob.id} is present and in job {job_id}"
            if job_id not in self.jobs or chunk not in self.jobs[job_id].outstanding:
                yield f"chunk {chunk} of {blob.id} is owned by job {job_id}, which does not have it"
        expected = set(blob.present) | set(blob.owner) | set(blob.held) | blob.punching
        if set(blob.taken) != expected:
            yield f"the taken set of {blob.id} is not present + in flight + held + being punched"
        for chunk in blob.waiting:
            if chunk in blob.present:
                yield f"somebody waits for chunk {chunk} of {blob.id}, which is present"
            if chunk not in blob.taken and chunk not in blob.demand:
                yield f"chunk {chunk} of {blob.id} is awaited and in no queue"
        inflight = sum(job.nbytes for job in self.jobs.values() if job.blob == blob.id)
        if inflight != blob.inflight:
            yield f"{blob.id}: {blob.inflight} bytes said to be in flight, {inflight} are"

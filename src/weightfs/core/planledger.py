"""The planner's books: which chunk is present, in a job, held, awaited or wanted. No policy: `Ledger` moves chunks.

Invariants (`Ledger.check` states them as sentences):

- `taken` is exactly: present, in a job, held, parked, or being punched. What is not taken may be fetched.
- A chunk is in at most one job, and in none while it is present.
- A chunk that somebody waits for is not present, and is taken or in the queue of demand.
- The bytes in flight are those of the chunks in ranged jobs. A whole stream cannot be cut to a size: it is not counted.
- A chunk has room in the file if it is present, in a job, or kept. `held` is the bytes of them all, and of the jobs of
  blobs that are gone; no job begins that would take it beyond the capacity.
- A job belongs to the `BlobPlan` that it was issued for: a blob that is removed and added again is another one, for
  which nothing is fetched before the last job of the old one (a ghost) has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.mirrors import MirrorBoard
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.core.planqueue import Timers

PAST = float("-inf")


@dataclass(slots=True, eq=False)
class BlobPlan:
    """All that is known of one blob."""

    id: BlobId
    shape: BlobShape
    present: ChunkSet
    taken: ChunkSet
    mirrors: tuple[Mirror, ...]
    board: MirrorBoard
    gone: bool = False  # removed; its jobs may still be in flight
    ghosts: int = 0  # jobs of former blobs with this id
    owner: dict[int, int] = field(default_factory=dict)  # chunk → job
    waiting: dict[int, set[int]] = field(default_factory=dict)  # chunk → waiters
    # Wanted by waiters, not taken; in order of arrival. (Ordered: the first of a plain dict is not found in O(1).)
    demand: OrderedDict[int, None] = field(default_factory=OrderedDict)
    wants: list[ChunkSpan] = field(default_factory=list)
    fill: bool = False
    fill_rank: int = 0  # place in the line of blobs to fill
    paused: bool = False  # nothing is fetched for the fill
    cursor: int = 0  # behind the last reader: fill takes the first hole from here on, then from the start
    draining: bool = False  # a reader needs a whole stream, which waits until nothing else is in flight
    punching: set[int] = field(default_factory=set)  # dropped, and not yet out of index and file
    inflight: int = 0  # bytes
    undurable: int = 0  # bytes
    lacking: int = 0  # bytes of room that its next job needs, if that did not fit
    kept: set[int] = field(default_factory=set)  # not present, and their room in the file was not given back
    stream_rate: float = 0.0  # bytes/s of one job, smoothed
    # Faults: `planfaults` says what they mean.
    rounds: int = 0
    desperate: bool = False
    tried: set[int] = field(default_factory=set)
    seen: dict[int, int] = field(default_factory=dict)
    first_job: int = 0
    worker_deaths: int = 0
    retry_at: float = PAST
    trouble: Failure | None = None  # the last one, while nothing has landed since: for people
    later: dict[int, float] = field(default_factory=dict)
    dead: dict[int, tuple[float, Failure]] = field(default_factory=dict)
    strikes: dict[int, int] = field(default_factory=dict)
    streamers: set[int] = field(default_factory=set)
    mismatches: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)
    held: dict[int, tuple[float, Failure]] = field(default_factory=dict)
    parked: dict[int, float] = field(default_factory=dict)
    failed: tuple[float, Failure] | None = None
    holds: dict[int, int] = field(default_factory=dict)
    burials: dict[int, int] = field(default_factory=dict)

    @property
    def unsettled(self) -> int:
        """Bytes asked of origins that are not durable yet."""
        return self.inflight + self.undurable

    def chunk_bytes(self, chunk: int) -> int:
        """The length of one chunk."""
        return len(self.shape.span_of(chunk))


@dataclass(slots=True)
class Job:
    """One fetch in flight. `nbytes` have not landed yet; `started` is in monotonic seconds.

    `issued` is the priority whose slot it takes for all its life; `priority` rises when a reader waits for it.
    """

    id: int
    blob: BlobPlan
    mirror: int
    issued: Priority
    priority: Priority
    started: float
    outstanding: set[int]
    nbytes: int
    whole: bool
    trim_at: int | None = None  # asked to end there, and not answered yet
    landed_bytes: int = 0


@dataclass(slots=True)
class Waiter:
    """A reader of `span`; `missing` is never empty, and was not visible when it was looked at."""

    blob: BlobPlan
    span: ChunkSpan
    missing: set[int]


@dataclass(slots=True)
class Room:
    """What chunks may take, in bytes (None: no bound), and the blobs of which something does not fit.

    `changed`: less is held than when they were looked at, or more may be.
    """

    demand: int | None = None
    background: int | None = None
    changed: bool = False
    short: dict[BlobPlan, Priority] = field(default_factory=dict)


class Ledger:
    """Blobs, jobs and waiters, and every move of a chunk between them. `out` gathers the commands of one event."""

    def __init__(self, limits: Limits, first_job: int = 1) -> None:
        self.limits = limits
        self.blobs: dict[BlobId, BlobPlan] = {}
        self.jobs: dict[int, Job] = {}
        self.waiters: dict[int, Waiter] = {}
        self.timers: Timers[BlobPlan] = Timers()
        self.touched: dict[BlobPlan, None] = {}  # blobs whose state changed in this event
        self.inflight = 0
        self.held = 0
        self.room = Room()
        self.next_job = first_job
        self.out: list[plan.Command] = []

    def add(self, event: plan.Added) -> None:
        """A new blob. ValueError if it is known: its present chunks have an owner already."""
        if event.blob in self.blobs:
            raise ValueError(f"blob {event.blob} was added twice")
        blob = BlobPlan(
            event.blob,
            event.shape,
            event.present,
            event.present.copy(),
            event.mirrors,
            MirrorBoard(event.mirrors),
            ghosts=sum(1 for job in self.jobs.values() if job.blob.id == event.blob),
            kept={chunk for chunk in event.kept if chunk not in event.present},
        )
        self.blobs[event.blob] = blob
        self.held += self.holding(blob)
        self.touched[blob] = None

    def remove(self, blob: BlobPlan, failure: Failure) -> None:
        """Forget the blob: its waiters get `failure`, its jobs are stopped."""
        del self.blobs[blob.id]
        # What is in flight may yet be written: it counts until its job says otherwise.
        self.held -= self.holding(blob)
        self.held += sum(blob.chunk_bytes(chunk) for chunk in blob.kept if chunk in blob.owner)
        self.room.changed = True
        self.room.short.pop(blob, None)
        blob.kept.clear()
        blob.gone = True
        self.wake_failed(blob, list(blob.waiting), failure)
        self.out.extend(plan.Stop(job.id) for job in self.jobs.values() if job.blob is blob)

    def issue(
        self,
        blob: BlobPlan,
        span: ChunkSpan,
        chunks: Iterable[int],
        mirror: int,
        priority: Priority,
        now: float,
        *,
        whole: bool = False,
    ) -> None:
        """Ask `mirror` for `span`, with `chunks` of it in a new job."""
        wanted = frozenset(chunks)
        nbytes = sum(blob.chunk_bytes(chunk) for chunk in wanted)
        self.held += self.cost(blob, wanted)
        job = Job(self.next_job, blob, mirror, priority, priority, now, set(wanted), nbytes, whole)
        self.next_job += 1
        self.jobs[job.id] = job
        self._count(job, nbytes)
        for chunk in wanted:
            blob.owner[chunk] = job.id
            blob.taken.add(chunk)
            blob.demand.pop(chunk, None)
        only = wanted if whole else frozenset()
        self.out.append(plan.Fetch(job.id, blob.id, span, mirror, priority, whole, only))

    def _count(self, job: Job, nbytes: int) -> None:
        if not job.whole:
            job.blob.inflight += nbytes
            self.inflight += nbytes

    def leave(self, job: Job, chunk: int) -> int:
        """Take a chunk out of its job (not yet out of `taken`); its bytes."""
        job.outstanding.discard(chunk)
        del job.blob.owner[chunk]
        nbytes = job.blob.chunk_bytes(chunk)
        job.nbytes -= nbytes
        self._count(job, -nbytes)
        return nbytes

    def free(self, job: Job, chunks: Iterable[int]) -> None:
        """Give chunks of a job back, and the room that they would have taken."""
        chunks = sorted(chunks)
        self.held -= self.cost(job.blob, chunks)
        self.room.changed = self.room.changed or bool(chunks)
        for chunk in chunks:
            self.leave(job, chunk)
            self.available(job.blob, chunk)

    def end(self, job: Job, now: float) -> None:
        """The job is over: what it did not land is free again."""
        blob = job.blob
        del self.jobs[job.id]
        self.free(job, job.outstanding)
        if job.landed_bytes and now > job.started:
            rate = job.landed_bytes / (now - job.started)
            blob.stream_rate = rate if not blob.stream_rate else 0.7 * blob.stream_rate + 0.3 * rate
        if blob.gone and (successor := self.blobs.get(blob.id)):
            successor.ghosts -= 1
            self.touched[successor] = None

    def available(self, blob: BlobPlan, chunk: int) -> None:
        """The chunk is nobody's: to the queue of demand if somebody waits, else to whoever wants it."""
        blob.taken.discard(chunk)
        if chunk in blob.waiting:
            blob.demand[chunk] = None

    def take(self, blob: BlobPlan, chunk: int) -> None:
        """The chunk is held or parked: not to be fetched now."""
        blob.taken.add(chunk)
        blob.demand.pop(chunk, None)

    def drop(self, blob: BlobPlan, chunks: Iterable[int]) -> None:
        """These are not visible any more, and not to be fetched before they are punched."""
        for chunk in chunks:
            if chunk in blob.present:
                blob.present.discard(chunk)  # still taken
                blob.punching.add(chunk)
                blob.kept.add(chunk)

    def punch(self, blob: BlobPlan, chunks: Iterable[int], *, freed: bool) -> None:
        """Index and file have forgotten these; `freed`: their room, too, and that of others that were kept."""
        for chunk in chunks:
            if freed and chunk in blob.kept:
                blob.kept.discard(chunk)
                if chunk not in blob.owner:
                    self.held -= blob.chunk_bytes(chunk)
                    self.room.changed = True
            if chunk in blob.punching:
                blob.punching.discard(chunk)
                self.available(blob, chunk)

    def cost(self, blob: BlobPlan, chunks: Iterable[int]) -> int:
        """Bytes of room that these take which have none yet."""
        return sum(blob.chunk_bytes(chunk) for chunk in chunks if chunk not in blob.kept)

    @staticmethod
    def holding(blob: BlobPlan) -> int:
        """Bytes of what is present or kept."""
        return blob.present.byte_count(blob.shape) + sum(blob.chunk_bytes(chunk) for chunk in blob.kept)

    def lost(self, job: Job, chunk: int) -> None:
        """The chunk landed in the file of a blob that is gone."""
        self.held -= self.leave(job, chunk)
        self.room.changed = True

    def land(self, job: Job, chunk: int) -> list[tuple[int, Waiter]]:
        """The chunk is visible; the waiters that waited for nothing else: they are out of the books."""
        blob = job.blob
        nbytes = self.leave(job, chunk)
        job.landed_bytes += nbytes
        blob.undurable += nbytes
        blob.present.add(chunk)
        blob.kept.discard(chunk)
        answered = []
        for number in sorted(blob.waiting.pop(chunk, ())):
            waiter = self.waiters[number]
            waiter.missing.discard(chunk)
            if not waiter.missing:
                answered.append((number, self.waiters.pop(number)))
        return answered

    def forget_waiter(self, number: int) -> None:
        """The reader is answered, or has gone."""
        waiter = self.waiters.pop(number, None)
        if waiter is None:
            return
        blob = waiter.blob
        self.touched[blob] = None
        for chunk in waiter.missing:
            blob.waiting[chunk].discard(number)
            if not blob.waiting[chunk]:
                del blob.waiting[chunk]
                blob.demand.pop(chunk, None)
        if not blob.demand and self.room.short.get(blob) is Priority.DEMAND:
            del self.room.short[blob]  # background is looked at again, and says so if it does not fit

    def wake_failed(self, blob: BlobPlan, chunks: Iterable[int], failure: Failure) -> None:
        """Tell everybody who waits for one of `chunks`."""
        for number in sorted({number for chunk in chunks for number in blob.waiting.get(chunk, ())}):
            self.forget_waiter(number)
            self.out.append(plan.Wake(number, failure))

    # ---- for tests and `weightfs status`

    def check(self) -> list[str]:
        """Sentences about broken invariants; empty if all is well."""
        problems = [problem for blob in self.blobs.values() for problem in self._check_blob(blob)]
        for number, waiter in self.waiters.items():
            if not waiter.missing or any(
                number not in waiter.blob.waiting[chunk] for chunk in waiter.missing
            ):
                problems.append(f"waiter {number} waits for nothing, or for what does not know of it")
        inflight = sum(job.nbytes for job in self.jobs.values() if not job.whole)
        if inflight != self.inflight:
            problems.append(f"{self.inflight} bytes said to be in flight, {inflight} are")
        held = sum(self.holding(blob) for blob in self.blobs.values())
        held += sum(self.cost(job.blob, job.outstanding) for job in self.jobs.values())
        if held != self.held:
            problems.append(f"{self.held} bytes said to be held, {held} are")
        return problems

    def _check_blob(self, blob: BlobPlan) -> Iterator[str]:
        jobs = [job for job in self.jobs.values() if job.blob is blob]
        owner = {chunk: job.id for job in jobs for chunk in job.outstanding}
        if owner != blob.owner:
            yield f"the chunks of the jobs of {blob.id} are not those that it says are in a job"
        if len(owner) != sum(len(job.outstanding) for job in jobs):
            yield f"a chunk of {blob.id} is in two jobs"
        apart = [set(blob.present), set(blob.owner), set(blob.held), set(blob.parked), blob.punching]
        if set(blob.taken) != set().union(*apart) or len(blob.taken) != sum(map(len, apart)):
            yield f"the taken set of {blob.id} is not present, in flight, held, parked or being punched"
        for chunk in blob.waiting:
            if chunk in blob.present:
                yield f"somebody waits for chunk {chunk} of {blob.id}, which is present"
            if (chunk in blob.demand) is (chunk in blob.taken):
                yield f"chunk {chunk} of {blob.id} is awaited, and not either taken or in the queue"
        if blob.demand.keys() - blob.waiting.keys():
            yield f"chunks of {blob.id} are in the queue of demand, and nobody waits for them"
        inflight = sum(job.nbytes for job in jobs if not job.whole)
        if inflight != blob.inflight:
            yield f"{blob.id}: {blob.inflight} bytes said to be in flight, {inflight} are"

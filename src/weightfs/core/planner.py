"""The sans-IO planner: who waits, what is in flight, what to fetch next. `feed(event, now)` returns commands.

Invariants, held under Hypothesis in tests/core/test_planner_machine.py:

- A chunk is in at most one job, and never in one while it is present: two writers of one chunk cannot exist. A chunk
  leaves a job only by the job's own word (landed, mismatched, trimmed, done, failed).
- Every waiter gets exactly one `Wake`, unless it withdrew.
- Fill and read-ahead never take demand's own slots, and stop at the background bounds of `Limits`.
- What was given up is not tried again before its hold ends; a `Need` for it is answered at once with the failure.
- No wake-up is lost: while something is to be fetched and nothing is in flight, either a `SleepUntil` is pending or the
  blob waits for its landed bytes to become `Durable`.
- What is held never exceeds the capacity by what was fetched after it was set.
- An event costs what it touches: no loop over all blobs or all waiters.

The books are `planledger`'s, what to do about faults is `planfaults`', what to fetch next `planschedule`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.mirrors import MirrorBoard, MirrorScore, joined
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.core.planfaults import Faults
from weightfs.core.planledger import BlobPlan, Job, Ledger, Waiter
from weightfs.core.planschedule import Scheduler
from weightfs.core.planword import ChunkWord, chunk_words
from weightfs.errors import FailureKind

MAX_WANTS = 16  # read-ahead windows remembered per blob: twice the streams that `readahead` tracks
_ChunkEvent = plan.Durable | plan.Undone | plan.Refuted | plan.Dropped | plan.Punched
_REMOVED = Failure(FailureKind.CANCELLED, "the model was removed")


@dataclass(frozen=True, slots=True)
class InFlight:
    """One job, for status: `age` in seconds."""

    job: int
    blob: BlobId
    chunks: ChunkSpan
    mirror: str
    priority: Priority
    age: float
    nbytes_left: int


class Planner:
    """See the module. Not thread-safe; no method but `feed` changes anything."""

    def __init__(self, limits: Limits | None = None, *, first_job: int = 1) -> None:
        self.limits = limits or Limits()
        self._ledger = Ledger(self.limits, first_job)
        self._faults = Faults(self._ledger)
        self._scheduler = Scheduler(self._ledger, self._faults)

    # ---- what the driver may ask

    def present(self, blob: BlobId) -> ChunkSet:
        """The visible chunks; shared with the planner: read only."""
        return self._ledger.blobs[blob].present

    def knows(self, blob: BlobId) -> bool:
        """Whether the blob was added."""
        return blob in self._ledger.blobs

    def paused(self, blob: BlobId) -> bool:
        """Whether the blob's fill is held back. KeyError."""
        return self._ledger.blobs[blob].paused

    def waiting(self, blob: BlobId | None = None) -> int:
        """How many readers wait, for one blob or in all."""
        if blob is None:
            return len(self._ledger.waiters)
        return len({waiter for waiters in self._ledger.blobs[blob].waiting.values() for waiter in waiters})

    def scores(self, blob: BlobId) -> tuple[MirrorScore, ...]:
        """What is known about the blob's mirrors."""
        return self._ledger.blobs[blob].board.snapshot()

    def failure(self, blob: BlobId) -> Failure | None:
        """Why the blob, or some chunk of it, is given up for now; None if nothing is. KeyError."""
        state = self._ledger.blobs[blob]
        if state.failed:
            return state.failed[1]
        return next((failure for _, failure in state.held.values()), None)

    def stuck(self, blob: BlobId) -> Failure | None:
        """The failure that keeps the blob from being completed now: everything else of it has been tried."""
        state = self._ledger.blobs.get(blob)
        if state is None:
            return None
        if state.failed:
            return state.failed[1]
        # What is left is present or held: there is nothing in flight, put off or being punched.
        return self.failure(blob) if len(state.present) + len(state.held) == state.shape.chunk_count else None

    def busy(self, blob: BlobId) -> bool:
        """Whether any job of the blob (known or removed) is in flight."""
        return any(job.blob.id == blob for job in self._ledger.jobs.values())

    def busy_blobs(self) -> set[BlobId]:
        """The blobs that have a job in flight, or a reader that waits."""
        found = {job.blob.id for job in self._ledger.jobs.values()}
        return found | {waiter.blob.id for waiter in self._ledger.waiters.values()}

    @property
    def held_bytes(self) -> int:
        """What chunks take: present ones, those in flight, and those whose room was not given back."""
        return self._ledger.held

    @property
    def reserved_bytes(self) -> int:
        """The part of `held_bytes` that is in flight, and may not be in the files yet."""
        jobs = self._ledger.jobs.values()
        return sum(self._ledger.cost(job.blob, job.outstanding) for job in jobs)

    def short(self) -> dict[BlobId, Priority]:
        """Of which blobs something does not fit (of background, the first in line), and how urgent it is."""
        return {blob.id: priority for blob, priority in self._ledger.room.short.items()}

    @property
    def is_short(self) -> bool:
        """Whether something does not fit."""
        return bool(self._ledger.room.short)

    def holding(self, blob: BlobId) -> int:
        """What the blob's chunks take in its file. KeyError."""
        return self._ledger.holding(self._ledger.blobs[blob])

    @property
    def next_job(self) -> int:
        """Jobs that begin from now on have this number or a higher one."""
        return self._ledger.next_job

    def lacking_bytes(self, blob: BlobId) -> int:
        """The room that the next job needs of a blob in `short`: one chunk's, or a whole stream's."""
        return self._ledger.blobs[blob].lacking

    def demanded_bytes(self) -> int:
        """The room that all jobs need for which readers wait, and which do not fit."""
        short = self._ledger.room.short
        demand = [blob for blob, priority in short.items() if priority is Priority.DEMAND]
        return sum(max(blob.lacking, self._ledger.cost(blob, blob.demand)) for blob in demand)

    def urgent(self, job: int) -> bool:
        """Whether a reader waits for what the job fetches. False for one that has ended."""
        found = self._ledger.jobs.get(job)
        return found is not None and found.priority is Priority.DEMAND

    def jobs(self, now: float) -> list[InFlight]:
        """What is in flight, oldest first."""
        return [_describe(job, now) for job in self._ledger.jobs.values()]

    def words(self, blob: BlobId, chunks: ChunkSpan, now: float) -> tuple[ChunkWord, ...]:
        """Where each of `chunks` is, and what it waits for. KeyError; the caller bounds how many."""
        return chunk_words(self._ledger, self._ledger.blobs[blob], chunks, now)

    def idle(self) -> bool:
        """Nothing in flight and nobody waiting."""
        return not self._ledger.jobs and not self._ledger.waiters

    def check(self) -> list[str]:
        """Sentences about broken invariants; empty if all is well."""
        return self._ledger.check()

    # ---- events

    def feed(self, event: plan.Event, now: float) -> list[plan.Command]:
        """Take one event at monotonic time `now`; return what to do, in order.

        ValueError if a blob is added twice; IndexError if a span or chunk is not one of its blob.
        """
        self._ledger.out = []
        self._faults.release(now)
        match event:
            case plan.Added():
                self._ledger.add(event)
            case plan.Removed(blob_id):
                self._removed(blob_id)
            case plan.Withdrawn(waiter):
                self._ledger.forget_waiter(waiter)
            case plan.Tick():
                pass
            case plan.Capacity(demand, background):
                self._scheduler.set_capacity(demand, background)
            case plan.NoRoom(failure):
                self._scheduler.refuse(failure)
            case plan.Background(on):
                self._scheduler.set_background(on)
            case plan.Landed() | plan.Mismatched() | plan.Trimmed() | plan.Done() | plan.Failed():
                self._job_event(event, now)
            case _:
                self._blob_event(event, now)
        self._scheduler.run(now)
        self._scheduler.set_alarm(now, ticked=isinstance(event, plan.Tick))
        return self._ledger.out

    def _job_event(self, event: plan.JobEvent, now: float) -> None:
        job = self._ledger.jobs.get(event.job)
        if job is None:
            return  # of a job that has ended: nothing of it is ours to change
        self._ledger.touched[job.blob] = None
        match event:
            case plan.Landed(_, chunk):
                if chunk in job.outstanding:
                    self._landed(job, chunk, now)
            case plan.Mismatched(_, chunk, failure):
                if chunk in job.outstanding:
                    self._faults.mismatched(job, chunk, failure, now)
            case plan.Trimmed(_, stop):
                self._trimmed(job, stop)
            case _:
                self._job_ended(job, event, now)

    def _job_ended(self, job: Job, event: plan.Done | plan.Failed, now: float) -> None:
        left = bool(job.outstanding) and job.trim_at is None
        self._ledger.end(job, now)
        if job.blob.gone:
            return
        if isinstance(event, plan.Failed):
            self._faults.failed(job, event.failure, event.jitter, now)
        elif left:
            self._faults.ended_early(job, now)

    def _blob_event(self, event: plan.BlobEvent, now: float) -> None:
        blob = self._ledger.blobs.get(event.blob)
        if blob is None:  # it was removed meanwhile
            if isinstance(event, plan.Need):
                self._ledger.out.append(plan.Wake(event.waiter, _REMOVED))
            return
        self._ledger.touched[blob] = None
        match event:
            case plan.Need(waiter, _, span):
                blob.cursor = span.stop
                self._scheduler.favour(blob)
                self._admit(waiter, blob, span)
            case plan.Want(_, span):
                blob.wants = [*blob.wants[-(MAX_WANTS - 1) :], span]
            case plan.Fill(_, on):
                self._scheduler.set_fill(blob, on)
            case plan.Pause(_, on):
                self._scheduler.set_paused(blob, on)
            case plan.Remirrored(_, mirrors):
                self._remirrored(blob, mirrors)
            case _:
                self._chunk_event(blob, event, now)

    def _chunk_event(self, blob: BlobPlan, event: _ChunkEvent, now: float) -> None:
        """What has become of chunks that had landed."""
        match event:
            case plan.Refuted(_, sources):
                self._faults.refuted(blob, sources, now)
            case plan.Dropped(_, chunks):
                self._ledger.drop(blob, chunks)
            case plan.Punched(_, chunks, freed):
                self._ledger.punch(blob, chunks, freed=freed)
            case _:
                self._settled(blob, event, now)

    def _settled(self, blob: BlobPlan, event: plan.Durable | plan.Undone, now: float) -> None:
        blob.undurable = max(0, blob.undurable - event.nbytes)
        if isinstance(event, plan.Durable):
            self._faults.recorded(blob)
        elif event.failure is not None:
            self._faults.unrecorded(blob, event.failure, now)

    def _removed(self, blob_id: BlobId) -> None:
        if blob := self._ledger.blobs.get(blob_id):
            self._ledger.remove(blob, _REMOVED)
            self._scheduler.remove(blob)

    def _remirrored(self, blob: BlobPlan, mirrors: tuple[Mirror, ...]) -> None:
        blob.mirrors = joined(blob.mirrors, mirrors)
        blob.board = MirrorBoard(blob.mirrors)
        self._faults.forgive(blob)

    def _admit(self, number: int, blob: BlobPlan, span: ChunkSpan) -> None:
        """Answer a reader at once if that can be done, else let it wait for what is missing."""
        ledger = self._ledger
        missing = [chunk for hole in blob.present.holes(span) for chunk in hole]
        if not missing:
            ledger.out.append(plan.Wake(number))
            return
        held = next((blob.held[chunk] for chunk in missing if chunk in blob.held), None)
        if given_up := blob.failed or held:
            ledger.out.append(plan.Wake(number, given_up[1]))
            return
        ledger.waiters[number] = Waiter(blob, span, set(missing))
        for chunk in missing:
            blob.waiting.setdefault(chunk, set()).add(number)
            if chunk in blob.owner:
                self._promote(ledger.jobs[blob.owner[chunk]], chunk)
            elif chunk not in blob.taken:
                blob.demand[chunk] = None

    def _promote(self, job: Job, chunk: int) -> None:
        """A reader waits for a chunk of a running job: take it out if it stands behind what nobody waits for."""
        if job.whole or job.trim_at is not None:
            return
        behind = sum(1 for other in job.outstanding if other < chunk and other not in job.blob.waiting)
        if behind >= self.limits.trim_distance:
            job.trim_at = chunk
            self._ledger.out.append(plan.Trim(job.id, chunk))
        else:
            job.priority = Priority.DEMAND

    def _trimmed(self, job: Job, stop: int) -> None:
        asked, job.trim_at = job.trim_at, None
        self._ledger.free(job, [chunk for chunk in job.outstanding if chunk >= stop])
        # Readers that came for earlier chunks meanwhile. Never again for what the job has passed: that would not end.
        for chunk in sorted(job.outstanding):
            if asked is not None and chunk < asked and chunk in job.blob.waiting:
                self._promote(job, chunk)

    def _landed(self, job: Job, chunk: int, now: float) -> None:
        if job.blob.gone:
            self._ledger.lost(job, chunk)
            return
        answered = self._ledger.land(job, chunk)
        self._faults.succeeded(job, chunk, now)
        for number, waiter in answered:  # a chunk that it had already may have been dropped since
            self._admit(number, waiter.blob, waiter.span)


def _describe(job: Job, now: float) -> InFlight:
    span = ChunkSpan(min(job.outstanding, default=0), max(job.outstanding, default=-1) + 1)
    mirror = job.blob.mirrors[job.mirror].url
    return InFlight(job.id, job.blob.id, span, mirror, job.priority, now - job.started, job.nbytes)

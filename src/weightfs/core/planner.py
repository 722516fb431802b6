"""The sans-IO planner: who waits, what is in flight, what to fetch next. `feed(event, now)` returns commands.

Invariants, held under Hypothesis in tests/core/test_planner.py:

- A chunk is in at most one job, and never in one while it is present: two writers of one chunk cannot exist. A chunk
  leaves a job only by the job's own word (landed, mismatched, trimmed, done, failed).
- Every waiter gets exactly one `Wake`, unless it withdrew.
- Fill and read-ahead never take demand's own slots, and stop at the background bounds of `Limits`.
- What was given up is not tried again before its hold ends; a `Need` for it is answered at once with the failure.

The books are `planledger`'s, what to do about faults is `planfaults`', what to fetch next `planschedule`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.mirrors import MirrorBoard, MirrorScore
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.core.planfaults import Faults
from weightfs.core.planledger import BlobPlan, Job, Ledger, Waiter
from weightfs.core.planschedule import Scheduler
from weightfs.errors import FailureKind

MAX_WANTS = 16  # read-ahead windows remembered per blob: twice the streams that `readahead` tracks


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

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._ledger = Ledger(self.limits)
        self._faults = Faults(self._ledger)
        self._scheduler = Scheduler(self._ledger, self._faults)

    # ---- what the driver may ask

    def present(self, blob: BlobId) -> ChunkSet:
        """The visible chunks; shared with the planner: read only."""
        return self._ledger.blobs[blob].present

    def knows(self, blob: BlobId) -> bool:
        """Whether the blob was added."""
        return blob in self._ledger.blobs

    def waiting(self, blob: BlobId | None = None) -> int:
        """How many readers wait, for one blob or in all."""
        if blob is None:
            return len(self._ledger.waiters)
        return len({waiter for waiters in self._ledger.blobs[blob].waiting.values() for waiter in waiters})

    def scores(self, blob: BlobId) -> tuple[MirrorScore, ...]:
        """What is known about the blob's mirrors."""
        return self._ledger.blobs[blob].board.snapshot()

    def failure(self, blob: BlobId) -> Failure | None:
        """Why the blob, or some chunk of it, is given up for now; None if nothing is."""
        state = self._ledger.blobs[blob]
        if state.failed:
            return state.failed[1]
        return next((failure for _, failure in state.held.values()), None)

    def stuck(self, blob: BlobId) -> Failure | None:
        """The failure that keeps the blob from being completed now: everything else of it has been tried."""
        state = self._ledger.blobs.get(blob)
        if state is None or state.failed:
            return state.failed[1] if state and state.failed else None
        only_held = state.taken.full and not state.owner and not state.punching
        return self.failure(blob) if only_held else None

    def busy(self, blob: BlobId) -> bool:
        """Whether any job of the blob (known or removed) is in flight."""
        return any(job.blob == blob for job in self._ledger.jobs.values())

    def jobs(self, now: float) -> list[InFlight]:
        """What is in flight, oldest first."""
        return [self._describe(job, now) for job in self._ledger.jobs.values()]

    def _describe(self, job: Job, now: float) -> InFlight:
        blob = self._ledger.blobs.get(job.blob)
        span = ChunkSpan(min(job.outstanding, default=0), max(job.outstanding, default=-1) + 1)
        mirror = blob.mirrors[job.mirror].url if blob else ""
        return InFlight(job.id, job.blob, span, mirror, job.priority, now - job.started, job.nbytes)

    def idle(self) -> bool:
        """Nothing in flight and nobody waiting."""
        return not self._ledger.jobs and not self._ledger.waiters

    def check(self) -> list[str]:
        """Sentences about broken invariants; empty if all is well."""
        return self._ledger.check()

    # ---- events

    def feed(self, event: plan.Event, now: float) -> list[plan.Command]:
        """Take one event at monotonic time `now`; return what to do, in order."""
        self._ledger.out = []
        match event:
            case plan.Added():
                self._added(event)
            case plan.Removed(blob_id):
                self._removed(blob_id)
            case plan.Withdrawn(waiter):
                self._ledger.forget_waiter(waiter)
            case plan.Tick():
                self._scheduler.ticked()
            case plan.Landed() | plan.Mismatched() | plan.Trimmed() | plan.Done() | plan.Failed():
                self._job_event(event, now)
            case _:
                if blob := self._ledger.blobs.get(event.blob):  # else it was removed meanwhile
                    self._blob_event(blob, event, now)
        self._faults.release_holds(now)
        self._scheduler.run(now)
        return self._ledger.out

    def _job_event(self, event: plan.JobEvent, now: float) -> None:
        job = self._ledger.jobs.get(event.job)
        if job is None:
            return  # of a job that has ended: nothing of it is ours to change
        match event:
            case plan.Landed(_, chunk):
                self._landed(job, chunk, now)
            case plan.Mismatched(_, chunk, failure):
                self._faults.mismatched(job, chunk, failure, now)
            case plan.Trimmed(_, stop):
                job.trimming = False
                self._ledger.free(job, [chunk for chunk in job.outstanding if chunk >= stop])
            case plan.Done():
                self._done(job, now)
            case plan.Failed(_, failure, jitter):
                self._faults.failed(job, failure, jitter, now)

    def _blob_event(self, blob: BlobPlan, event: plan.BlobEvent, now: float) -> None:
        match event:
            case plan.Need():
                self._need(blob, event, now)
            case plan.Want(_, span):
                blob.wants = [*blob.wants[-(MAX_WANTS - 1) :], span]
                self._ledger.active[blob.id] = None
            case plan.Fill(_, on):
                self._ledger.set_fill(blob, on)
            case plan.Durable(_, nbytes):
                blob.undurable = max(0, blob.undurable - nbytes)
            case plan.Dropped(_, chunks):
                self._dropped(blob, chunks)
            case plan.Punched(_, chunks):
                self._punched(blob, chunks)
            case plan.Remirrored(_, mirrors):
                self._remirrored(blob, mirrors)

    def _added(self, event: plan.Added) -> None:
        board = MirrorBoard(event.mirrors)
        taken = event.present.copy()
        self._ledger.blobs[event.blob] = BlobPlan(
            event.blob, event.shape, event.present, taken, event.mirrors, board
        )

    def _removed(self, blob: BlobId) -> None:
        ledger = self._ledger
        state = ledger.blobs.pop(blob, None)
        ledger.filling.pop(blob, None)
        ledger.active.pop(blob, None)
        if state is None:
            return
        failure = Failure(FailureKind.CANCELLED, "the model was removed")
        for waiters in list(state.waiting.values()):
            for waiter in list(waiters):
                if waiter in ledger.waiters:
                    del ledger.waiters[waiter]
                    ledger.out.append(plan.Wake(waiter, failure))
        ledger.out.extend(plan.Stop(job.id) for job in ledger.jobs.values() if job.blob == blob)

    def _remirrored(self, blob: BlobPlan, mirrors: tuple[Mirror, ...]) -> None:
        # Jobs in flight name mirrors by number: new ones are appended, old ones kept in place.
        known = {mirror.url for mirror in blob.mirrors}
        blob.mirrors += tuple(mirror for mirror in mirrors if mirror.url not in known)
        blob.board = MirrorBoard(blob.mirrors)
        self._faults.forgive(blob)

    def _need(self, blob: BlobPlan, event: plan.Need, now: float) -> None:
        ledger = self._ledger
        self._faults.release_holds(now)
        missing = {chunk for hole in blob.present.holes(event.span) for chunk in hole}
        if not missing:
            ledger.out.append(plan.Wake(event.waiter))
            return
        failure = blob.failed[1] if blob.failed else None
        held = (blob.held[chunk][1] for chunk in sorted(missing) if chunk in blob.held)
        if failure := failure or next(held, None):
            ledger.out.append(plan.Wake(event.waiter, failure))
            return
        ledger.waiters[event.waiter] = Waiter(event.blob, missing)
        ledger.active[event.blob] = None
        blob.cursor = event.span.stop
        if blob.fill:
            ledger.filling = {event.blob: None, **ledger.filling}
        for chunk in sorted(missing):
            blob.waiting.setdefault(chunk, set()).add(event.waiter)
            if chunk in blob.owner:
                self._promote(ledger.jobs[blob.owner[chunk]], chunk)
            elif chunk not in blob.punching:
                blob.demand[chunk] = None

    def _promote(self, job: Job, chunk: int) -> None:
        """A reader waits for a chunk of a running job: take it out if the job is far from it, else lift the job."""
        behind = sum(1 for other in job.outstanding if other < chunk)
        if job.whole or job.trimming:
            return
        if behind >= self.limits.trim_distance and job.priority is not Priority.DEMAND:
            job.trimming = True
            self._ledger.out.append(plan.Trim(job.id, chunk))
        elif behind == 0:
            job.priority = Priority.DEMAND

    def _landed(self, job: Job, chunk: int, now: float) -> None:
        if chunk not in job.outstanding:
            return
        nbytes = self._ledger.leave(job, chunk)
        blob = self._ledger.blobs.get(job.blob)
        if blob is None:
            return
        job.landed_bytes += nbytes
        blob.undurable += nbytes
        blob.present.add(chunk)
        seconds = max(now - job.started, 1e-6) * nbytes / max(job.landed_bytes, 1)
        blob.board.succeeded(job.mirror, nbytes, seconds)
        self._faults.succeeded(blob, job, chunk)
        self._ledger.wake_visible(blob, chunk)

    def _done(self, job: Job, now: float) -> None:
        left = bool(job.outstanding) and not job.whole
        self._ledger.end(job, now)
        blob = self._ledger.blobs.get(job.blob)
        if left and blob:  # a driver that says done without landing must not spin
            blob.retry_at = now + self.limits.backoff_base

    def _dropped(self, blob: BlobPlan, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if chunk in blob.present:
                blob.present.discard(chunk)  # still taken
                blob.punching.add(chunk)

    def _punched(self, blob: BlobPlan, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if chunk in blob.punching:
                blob.punching.discard(chunk)
                self._ledger.available(blob, chunk)

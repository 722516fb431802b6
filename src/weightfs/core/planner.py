"""The sans-IO planner: who waits, what is in flight, what to fetch next. `feed(event, now)` returns commands.

Invariants, held under Hypothesis in tests/core/test_planner.py:

- A chunk is in at most one job, and never in one while it is present: two writers of one chunk cannot exist. A chunk
  leaves a job only by the job's own word (landed, mismatched, trimmed, done, failed).
- Every waiter gets exactly one `Wake`, unless it withdrew.
- Fill and read-ahead never take demand's own slots, and stop at the background bounds of `Limits`.
- What was given up is not tried again before its hold ends; a `Need` for it is answered at once with the failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.mirrors import MirrorBoard, MirrorScore
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.core.retry import delay, is_permanent
from weightfs.errors import FailureKind

MAX_WANTS = 16  # read-ahead windows remembered per blob: twice the streams that `readahead` tracks


@dataclass(slots=True)
class _Job:
    id: int
    blob: BlobId
    mirror: int
    priority: Priority
    started: float
    outstanding: set[int]
    nbytes: int  # not landed yet
    whole: bool = False
    trimming: bool = False
    landed_bytes: int = 0


@dataclass(slots=True)
class _Blob:
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
    dead: dict[int, Failure] = field(default_factory=dict)  # mirrors not to be asked before `failed_until`
    strikes: dict[int, int] = field(default_factory=dict)
    streamers: set[int] = field(default_factory=set)  # mirrors without ranges
    mismatches: dict[int, dict[int, int]] = field(default_factory=dict)  # chunk → mirror → count
    held: dict[int, tuple[float, Failure]] = field(default_factory=dict)
    holds: dict[int, int] = field(default_factory=dict)  # chunk (-1: the blob) → how often it was given up
    failed: tuple[float, Failure] | None = None
    stream_rate: float = 0.0  # bytes/s of one job, smoothed

    @property
    def unsettled(self) -> int:
        return self.inflight + self.undurable

    def chunk_bytes(self, chunk: int) -> int:
        return len(self.shape.span_of(chunk))


@dataclass(slots=True)
class _Waiter:
    blob: BlobId
    missing: set[int]


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
        self._blobs: dict[BlobId, _Blob] = {}
        self._jobs: dict[int, _Job] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._fill: dict[BlobId, None] = {}  # in line for fill, first served first
        self._active: dict[
            BlobId, None
        ] = {}  # blobs with anything to schedule or to wait for; the others cost nothing
        self._next_job = 1
        self._inflight = 0
        self._out: list[plan.Command] = []
        self._alarm = float("inf")

    # ---- what the driver may ask

    def present(self, blob: BlobId) -> ChunkSet:
        """The visible chunks; shared with the planner: read only."""
        return self._blobs[blob].present

    def knows(self, blob: BlobId) -> bool:
        """Whether the blob was added."""
        return blob in self._blobs

    def waiting(self, blob: BlobId | None = None) -> int:
        """How many readers wait, for one blob or in all."""
        if blob is None:
            return len(self._waiters)
        return len({waiter for waiters in self._blobs[blob].waiting.values() for waiter in waiters})

    def scores(self, blob: BlobId) -> tuple[MirrorScore, ...]:
        """What is known about the blob's mirrors."""
        return self._blobs[blob].board.snapshot()

    def failure(self, blob: BlobId) -> Failure | None:
        """Why the blob, or some chunk of it, is given up for now; None if nothing is."""
        state = self._blobs[blob]
        if state.failed:
            return state.failed[1]
        return next((failure for _, failure in state.held.values()), None)

    def stuck(self, blob: BlobId) -> Failure | None:
        """The failure that keeps the blob from being completed now: everything else of it has been tried."""
        state = self._blobs.get(blob)
        if state is None or state.failed:
            return state.failed[1] if state and state.failed else None
        only_held = state.taken.full and not state.owner and not state.punching
        return self.failure(blob) if only_held else None

    def busy(self, blob: BlobId) -> bool:
        """Whether any job of the blob (known or removed) is in flight."""
        return any(job.blob == blob for job in self._jobs.values())

    def jobs(self, now: float) -> list[InFlight]:
        """What is in flight, oldest first."""
        return [
            InFlight(
                job.id,
                job.blob,
                ChunkSpan(min(job.outstanding, default=0), max(job.outstanding, default=-1) + 1),
                self._blobs[job.blob].mirrors[job.mirror].url if job.blob in self._blobs else "",
                job.priority,
                now - job.started,
                job.nbytes,
            )
            for job in self._jobs.values()
        ]

    def idle(self) -> bool:
        """Nothing in flight and nobody waiting."""
        return not self._jobs and not self._waiters

    def check(self) -> list[str]:
        """Sentences about broken invariants; empty if all is well."""
        problems = []
        for blob in self._blobs.values():
            for chunk, job_id in blob.owner.items():
                if chunk in blob.present:
                    problems.append(f"chunk {chunk} of {blob.id} is present and in job {job_id}")
                if job_id not in self._jobs or chunk not in self._jobs[job_id].outstanding:
                    problems.append(
                        f"chunk {chunk} of {blob.id} is owned by job {job_id}, which does not have it"
                    )
            expected = set(blob.present) | set(blob.owner) | set(blob.held) | blob.punching
            if set(blob.taken) != expected:
                problems.append(
                    f"the taken set of {blob.id} is not present + in flight + held + being punched"
                )
            for chunk in blob.waiting:
                if chunk in blob.present:
                    problems.append(f"somebody waits for chunk {chunk} of {blob.id}, which is present")
                if chunk not in blob.taken and chunk not in blob.demand:
                    problems.append(f"chunk {chunk} of {blob.id} is awaited and in no queue")
            inflight = sum(job.nbytes for job in self._jobs.values() if job.blob == blob.id)
            if inflight != blob.inflight:
                problems.append(f"{blob.id}: {blob.inflight} bytes said to be in flight, {inflight} are")
        return problems

    # ---- events

    def feed(self, event: plan.Event, now: float) -> list[plan.Command]:
        """Take one event at monotonic time `now`; return what to do, in order."""
        self._out = []
        match event:
            case plan.Added():
                self._added(event)
            case plan.Removed(blob_id):
                self._removed(blob_id)
            case plan.Withdrawn(waiter):
                self._forget_waiter(waiter)
            case plan.Tick():
                self._alarm = float("inf")
            case plan.Landed() | plan.Mismatched() | plan.Trimmed() | plan.Done() | plan.Failed():
                self._job_event(event, now)
            case _:
                if blob := self._blobs.get(event.blob):  # else it was removed meanwhile
                    self._blob_event(blob, event, now)
        self._release_holds(now)
        self._schedule(now)
        self._set_alarm(now)
        return self._out

    def _job_event(self, event: plan.JobEvent, now: float) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            return  # of a job that has ended: nothing of it is ours to change
        match event:
            case plan.Landed(_, chunk):
                self._landed(job, chunk, now)
            case plan.Mismatched(_, chunk, failure):
                self._mismatched(job, chunk, failure, now)
            case plan.Trimmed(_, stop):
                job.trimming = False
                self._free(job, [chunk for chunk in job.outstanding if chunk >= stop])
            case plan.Done():
                self._done(job, now)
            case plan.Failed(_, failure, jitter):
                self._failed(job, failure, jitter, now)

    def _blob_event(self, blob: _Blob, event: plan.BlobEvent, now: float) -> None:
        match event:
            case plan.Need():
                self._need(blob, event, now)
            case plan.Want(_, span):
                blob.wants = [*blob.wants[-(MAX_WANTS - 1) :], span]
                self._active[blob.id] = None
            case plan.Fill(_, on):
                self._set_fill(blob, on)
            case plan.Durable(_, nbytes):
                blob.undurable = max(0, blob.undurable - nbytes)
            case plan.Dropped(_, chunks):
                self._dropped(blob, chunks)
            case plan.Punched(_, chunks):
                self._punched(blob, chunks)
            case plan.Remirrored(_, mirrors):
                self._remirrored(blob, mirrors)

    def _added(self, event: plan.Added) -> None:
        self._blobs[event.blob] = _Blob(
            event.blob,
            event.shape,
            event.present,
            event.present.copy(),
            event.mirrors,
            MirrorBoard(event.mirrors),
        )

    def _removed(self, blob: BlobId) -> None:
        state = self._blobs.pop(blob, None)
        self._fill.pop(blob, None)
        self._active.pop(blob, None)
        if state is None:
            return
        for waiters in list(state.waiting.values()):
            for waiter in list(waiters):
                if waiter in self._waiters:
                    del self._waiters[waiter]
                    self._out.append(
                        plan.Wake(waiter, Failure(FailureKind.CANCELLED, "the model was removed"))
                    )
        self._out.extend(plan.Stop(job.id) for job in self._jobs.values() if job.blob == blob)

    def _remirrored(self, blob: _Blob, mirrors: tuple[Mirror, ...]) -> None:
        # Jobs in flight name mirrors by number: new ones are appended, old ones kept in place.
        known = {mirror.url for mirror in blob.mirrors}
        blob.mirrors += tuple(mirror for mirror in mirrors if mirror.url not in known)
        blob.board = MirrorBoard(blob.mirrors)
        blob.dead.clear()
        blob.strikes.clear()
        blob.mismatches.clear()
        blob.holds.clear()
        blob.failed = None
        for chunk in list(blob.held):
            self._unhold(blob, chunk)

    def _need(self, blob: _Blob, event: plan.Need, now: float) -> None:
        self._release_holds(now)
        missing = {chunk for hole in blob.present.holes(event.span) for chunk in hole}
        if not missing:
            self._out.append(plan.Wake(event.waiter))
            return
        failure = blob.failed[1] if blob.failed else None
        failure = failure or next(
            (blob.held[chunk][1] for chunk in sorted(missing) if chunk in blob.held), None
        )
        if failure:
            self._out.append(plan.Wake(event.waiter, failure))
            return
        self._waiters[event.waiter] = _Waiter(event.blob, missing)
        self._active[event.blob] = None
        blob.cursor = event.span.stop
        if blob.fill:
            self._fill = {event.blob: None, **self._fill}
        for chunk in sorted(missing):
            blob.waiting.setdefault(chunk, set()).add(event.waiter)
            if chunk in blob.owner:
                self._promote(self._jobs[blob.owner[chunk]], chunk)
            elif chunk not in blob.punching:
                blob.demand[chunk] = None

    def _promote(self, job: _Job, chunk: int) -> None:
        """A reader waits for a chunk of a running job: take it out if the job is far from it, else lift the job."""
        behind = sum(1 for other in job.outstanding if other < chunk)
        if job.whole or job.trimming:
            return
        if behind >= self.limits.trim_distance and job.priority is not Priority.DEMAND:
            job.trimming = True
            self._out.append(plan.Trim(job.id, chunk))
        elif behind == 0:
            job.priority = Priority.DEMAND

    def _set_fill(self, blob: _Blob, on: bool) -> None:
        blob.fill = on
        if on:
            self._fill.setdefault(blob.id)
            self._active[blob.id] = None
        else:
            self._fill.pop(blob.id, None)

    def _landed(self, job: _Job, chunk: int, now: float) -> None:
        if chunk not in job.outstanding:
            return
        nbytes = self._leave(job, chunk)
        blob = self._blobs.get(job.blob)
        if blob is None:
            return
        job.landed_bytes += nbytes
        blob.undurable += nbytes
        blob.present.add(chunk)
        blob.attempt = 0
        blob.retry_at = float("-inf")
        blob.strikes.pop(job.mirror, None)
        blob.mismatches.pop(chunk, None)
        blob.holds.pop(chunk, None)
        blob.holds.pop(-1, None)
        blob.board.succeeded(
            job.mirror, nbytes, max(now - job.started, 1e-6) * nbytes / max(job.landed_bytes, 1)
        )
        blob.demand.pop(chunk, None)
        for waiter in blob.waiting.pop(chunk, ()):
            missing = self._waiters[waiter].missing
            missing.discard(chunk)
            if not missing:
                del self._waiters[waiter]
                self._out.append(plan.Wake(waiter))

    def _leave(self, job: _Job, chunk: int) -> int:
        """Take a chunk out of its job (not yet out of `taken`); its bytes."""
        job.outstanding.discard(chunk)
        blob = self._blobs.get(job.blob)
        if blob is None:
            return 0
        nbytes = blob.chunk_bytes(chunk)
        job.nbytes -= nbytes
        blob.inflight -= nbytes
        self._inflight -= nbytes
        del blob.owner[chunk]
        return nbytes

    def _free(self, job: _Job, chunks: Iterable[int]) -> None:
        """Give chunks of a job back."""
        for chunk in sorted(chunks):
            self._leave(job, chunk)
            if (blob := self._blobs.get(job.blob)) is not None:
                self._available(blob, chunk)

    def _end(self, job: _Job, now: float) -> None:
        del self._jobs[job.id]
        blob = self._blobs.get(job.blob)
        self._free(job, list(job.outstanding))
        if blob is None:
            self._inflight -= job.nbytes
        elif job.landed_bytes and now > job.started:
            rate = job.landed_bytes / (now - job.started)
            blob.stream_rate = rate if not blob.stream_rate else 0.7 * blob.stream_rate + 0.3 * rate

    def _done(self, job: _Job, now: float) -> None:
        left = bool(job.outstanding) and not job.whole
        self._end(job, now)
        if left and job.blob in self._blobs:  # a driver that says done without landing must not spin
            self._blobs[job.blob].retry_at = now + self.limits.backoff_base

    def _dropped(self, blob: _Blob, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if chunk in blob.present:
                blob.present.discard(chunk)  # still taken
                blob.punching.add(chunk)

    def _punched(self, blob: _Blob, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if chunk in blob.punching:
                blob.punching.discard(chunk)
                self._available(blob, chunk)

    def _available(self, blob: _Blob, chunk: int) -> None:
        """The chunk is nobody's: to the queue of demand if somebody waits, else to whoever wants it."""
        blob.taken.discard(chunk)
        if chunk in blob.waiting:
            blob.demand[chunk] = None
            self._active[blob.id] = None
        if blob.fill:
            blob.cursor = min(blob.cursor, chunk)

    def _forget_waiter(self, waiter: int) -> None:
        entry = self._waiters.pop(waiter, None)
        if entry is None:
            return
        blob = self._blobs[entry.blob]
        for chunk in entry.missing:
            waiters = blob.waiting.get(chunk)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del blob.waiting[chunk]
                    blob.demand.pop(chunk, None)

    # ---- faults

    def _mismatched(self, job: _Job, chunk: int, failure: Failure, now: float) -> None:
        if chunk not in job.outstanding:
            return
        self._free(job, [chunk])
        blob = self._blobs.get(job.blob)
        if blob is None:
            return
        blob.board.failed(job.mirror, FailureKind.MISMATCH, now)
        counts = blob.mismatches.setdefault(chunk, {})
        counts[job.mirror] = counts.get(job.mirror, 0) + 1
        if len(self._avoid(blob, chunk)) >= len(blob.mirrors):
            self._hold(blob, chunk, failure, now)

    def _failed(self, job: _Job, failure: Failure, jitter: float, now: float) -> None:
        self._end(job, now)
        blob = self._blobs.get(job.blob)
        if blob is None or failure.kind is FailureKind.CANCELLED:
            return
        match failure.kind:
            case FailureKind.NO_RANGES if not job.whole:
                blob.streamers.add(job.mirror)
                return
            case FailureKind.NO_SPACE | FailureKind.DISK:
                self._give_up(blob, failure, now)
                return
            case FailureKind.WORKER:
                pass
            case kind:
                blob.board.failed(job.mirror, kind, now, failure.retry_after)
        if is_permanent(failure.kind) or self._struck_out(blob, job.mirror, failure.kind):
            blob.dead[job.mirror] = failure
            if len(blob.dead) >= len(blob.mirrors):
                self._give_up(blob, failure, now)
            return
        self._back_off(blob, job, failure, jitter, now)

    def _struck_out(self, blob: _Blob, mirror: int, kind: FailureKind) -> bool:
        if kind not in (FailureKind.PROTOCOL, FailureKind.NO_RANGES):
            return False
        blob.strikes[mirror] = blob.strikes.get(mirror, 0) + 1
        return blob.strikes[mirror] >= self.limits.protocol_strikes

    def _back_off(self, blob: _Blob, job: _Job, failure: Failure, jitter: float, now: float) -> None:
        """Wait before the next try once every living mirror had its turn since bytes last came."""
        if job.started < blob.last_failure:
            return  # issued before the last counted failure: the same trouble seen twice
        blob.last_failure = now
        blob.attempt += 1
        alive = max(1, len(blob.mirrors) - len(blob.dead))
        rounds, turn = divmod(blob.attempt, alive)
        if self.limits.max_retries is not None and rounds > self.limits.max_retries:
            self._give_up(blob, failure, now)
            return
        if turn == 0:
            pause = delay(
                rounds - 1,
                base=self.limits.backoff_base,
                cap=self.limits.backoff_cap,
                retry_after=failure.retry_after,
                jitter=jitter,
            )
            blob.retry_at = now + pause

    def _hold_time(self, blob: _Blob, chunk: int) -> float:
        count = blob.holds.get(chunk, 0)
        blob.holds[chunk] = count + 1
        return min(self.limits.hold_cap, self.limits.hold_base * 2.0 ** min(count, 16))

    def _hold(self, blob: _Blob, chunk: int, failure: Failure, now: float) -> None:
        until = now + self._hold_time(blob, chunk)
        blob.held[chunk] = (until, failure)
        self._active[blob.id] = None
        blob.taken.add(chunk)
        blob.demand.pop(chunk, None)
        self._wake_failed(blob, [chunk], failure)
        self._out.append(plan.GaveUp(blob.id, failure, until))

    def _give_up(self, blob: _Blob, failure: Failure, now: float) -> None:
        until = now + self._hold_time(blob, -1)
        blob.failed = (until, failure)
        self._active[blob.id] = None
        blob.attempt = 0
        self._wake_failed(blob, list(blob.waiting), failure)
        self._out.append(plan.GaveUp(blob.id, failure, until))

    def _wake_failed(self, blob: _Blob, chunks: Iterable[int], failure: Failure) -> None:
        for waiter in {waiter for chunk in chunks for waiter in blob.waiting.get(chunk, ())}:
            self._forget_waiter(waiter)
            self._out.append(plan.Wake(waiter, failure))

    def _unhold(self, blob: _Blob, chunk: int) -> None:
        del blob.held[chunk]
        self._available(blob, chunk)
        blob.mismatches.pop(chunk, None)

    def _release_holds(self, now: float) -> None:
        for blob in self._active_blobs():
            if blob.failed and blob.failed[0] <= now:
                blob.failed = None
                blob.dead.clear()
                blob.strikes.clear()
                blob.retry_at = now
            if blob.held:
                for chunk in [chunk for chunk, (until, _) in blob.held.items() if until <= now]:
                    self._unhold(blob, chunk)

    # ---- what to fetch next

    def _avoid(self, blob: _Blob, chunk: int) -> frozenset[int]:
        bad = {
            m
            for m, count in blob.mismatches.get(chunk, {}).items()
            if count >= self.limits.mismatches_per_mirror
        }
        if len(bad | blob.dead.keys()) < len(blob.mirrors):
            # A mirror that gave one wrong chunk is asked for it again only if no other is left to ask.
            tried = bad | blob.mismatches.get(chunk, {}).keys() | blob.dead.keys()
            bad = tried if len(tried) < len(blob.mirrors) else bad
        return frozenset(bad | blob.dead.keys())

    def _active_blobs(self) -> list[_Blob]:
        return [self._blobs[blob] for blob in self._active]

    def _schedule(self, now: float) -> None:
        ready = [blob for blob in self._active_blobs() if not blob.failed and blob.retry_at <= now]
        for blob in ready:
            while blob.demand and self._start(blob, self._demand_run(blob), Priority.DEMAND, now):
                pass
        for blob in ready:
            if blob.wants:
                self._schedule_wants(blob, now)
        self._schedule_fill(now)
        for blob in self._active_blobs():
            if not (blob.demand or blob.wants or blob.fill or blob.failed or blob.held):
                del self._active[blob.id]

    def _demand_run(self, blob: _Blob) -> ChunkSpan:
        start = stop = next(iter(blob.demand))
        cap = max(1, self.limits.job_bytes // blob.shape.chunk_length)
        while stop in blob.demand and stop - start < cap:
            stop += 1
        return ChunkSpan(start, stop)

    def _schedule_wants(self, blob: _Blob, now: float) -> None:
        """Newest window first; each is cut so that a large one is on at least four connections."""
        while blob.wants:
            window = blob.wants[-1]
            cap = max(1, min(self.limits.job_bytes // blob.shape.chunk_length, -(-len(window) // 4)))
            hole = next(blob.taken.holes(window), None)
            if hole is None:
                blob.wants.pop()
            elif not self._start(
                blob, ChunkSpan(hole.start, min(hole.stop, hole.start + cap)), Priority.READAHEAD, now
            ):
                return

    def _schedule_fill(self, now: float) -> None:
        for blob_id in list(self._fill):
            blob = self._blobs[blob_id]
            if blob.failed or blob.retry_at > now:
                continue
            while (run := self._fill_run(blob)) is not None:
                if not self._start(blob, run, Priority.FILL, now):
                    break
                blob.cursor = run.stop
            else:
                if blob.present.full:
                    self._set_fill(blob, on=False)

    def _fill_run(self, blob: _Blob) -> ChunkSpan | None:
        start = blob.taken.first_hole(blob.cursor)
        if start is None:
            start = blob.taken.first_hole(0)
        if start is None:
            return None
        target = blob.stream_rate * self.limits.fill_job_seconds or self.limits.first_job_bytes
        cap = max(1, min(self.limits.job_bytes, int(target)) // blob.shape.chunk_length)
        return next(blob.taken.holes(ChunkSpan(start, min(start + cap, blob.shape.chunk_count))))

    def _may_start(self, blob: _Blob, nbytes: int, priority: Priority) -> bool:
        limits = self.limits
        if len(self._jobs) >= limits.max_jobs:
            return False
        if priority is Priority.DEMAND:
            return not blob.unsettled or blob.unsettled + nbytes <= limits.unsettled_bytes
        background = sum(1 for job in self._jobs.values() if job.priority is not Priority.DEMAND)
        if background >= limits.background_jobs:
            return False
        if priority is Priority.FILL and self._waiters:
            fills = sum(1 for job in self._jobs.values() if job.priority is Priority.FILL)
            if fills >= limits.fill_jobs_under_demand:
                return False
        if self._inflight and self._inflight + nbytes > limits.budget_bytes:
            return False
        return not blob.unsettled or blob.unsettled + nbytes <= limits.background_unsettled_bytes

    def _start(self, blob: _Blob, run: ChunkSpan, priority: Priority, now: float) -> bool:
        """Begin a job for `run`, shortened to what the bounds allow; False if none may begin now."""
        avoid = self._avoid(blob, run.start)
        ranged = avoid | blob.streamers
        if len(ranged) >= len(blob.mirrors) and blob.streamers - avoid:
            return self._start_whole(blob, priority, avoid, now)
        while len(run) > 1 and not self._may_start(blob, len(blob.shape.bytes_of(run)), priority):
            run = ChunkSpan(run.start, run.start + len(run) // 2)
        if not self._may_start(blob, len(blob.shape.bytes_of(run)), priority):
            return False
        mirror = blob.board.choose(now, frozenset(ranged))
        if mirror is None:
            self._no_mirror(blob, run.start, now)
            return blob.failed is None  # the chunk is held: the others may go on
        run = next(
            (ChunkSpan(run.start, c) for c in run if c > run.start and self._shuns(blob, c, mirror)), run
        )
        self._issue(blob, run, frozenset(run), mirror, priority, now, whole=False)
        return True

    def _shuns(self, blob: _Blob, chunk: int, mirror: int) -> bool:
        return chunk in blob.mismatches and mirror in self._avoid(blob, chunk)

    def _start_whole(self, blob: _Blob, priority: Priority, avoid: frozenset[int], now: float) -> bool:
        """No origin has ranges: one stream of everything at a time; waits until nothing else is in flight."""
        if blob.owner or len(self._jobs) >= self.limits.max_jobs:
            return False
        others = frozenset(range(len(blob.mirrors))) - blob.streamers
        mirror = blob.board.choose(now, avoid | others)
        if mirror is None:
            return False
        holes = frozenset(chunk for hole in blob.taken.holes(blob.shape.chunks) for chunk in hole)
        self._issue(blob, blob.shape.chunks, holes, mirror, priority, now, whole=True)
        return True

    def _no_mirror(self, blob: _Blob, chunk: int, now: float) -> None:
        if not blob.mirrors:
            self._give_up(blob, Failure(FailureKind.NOT_FOUND, "no mirror is known for this file"), now)
            return
        failure = next(iter(blob.dead.values()), None)
        text = failure.text if failure else "every mirror gave other bytes than the chunk list says"
        kind = failure.kind if failure else FailureKind.MISMATCH
        self._hold(blob, chunk, Failure(kind, text, failure.mirror if failure else "", None, chunk), now)

    def _issue(
        self,
        blob: _Blob,
        span: ChunkSpan,
        chunks: frozenset[int],
        mirror: int,
        priority: Priority,
        now: float,
        *,
        whole: bool,
    ) -> None:
        nbytes = sum(blob.chunk_bytes(chunk) for chunk in chunks)
        job = _Job(self._next_job, blob.id, mirror, priority, now, set(chunks), nbytes, whole)
        self._next_job += 1
        self._jobs[job.id] = job
        self._inflight += nbytes
        blob.inflight += nbytes
        for chunk in chunks:
            blob.owner[chunk] = job.id
            blob.taken.add(chunk)
            blob.demand.pop(chunk, None)
        self._out.append(
            plan.Fetch(job.id, blob.id, span, mirror, priority, whole, chunks if whole else frozenset())
        )

    def _alarms(self, now: float) -> Iterator[float]:
        for blob in self._active_blobs():
            if blob.failed:
                yield blob.failed[0]
            elif blob.retry_at > now and (blob.demand or blob.wants or blob.fill):
                yield blob.retry_at
            yield from (until for until, _ in blob.held.values())

    def _set_alarm(self, now: float) -> None:
        due = min(self._alarms(now), default=float("inf"))
        if due < self._alarm:
            self._alarm = due
            self._out.append(plan.SleepUntil(due))

"""What to fetch next: what readers wait for, then read-ahead, then fill, within the bounds of `Limits`.

Rule: fill and read-ahead never take demand's own slots, and stop at the background bounds of `Limits`.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.plan import Priority
from weightfs.core.planfaults import Faults
from weightfs.core.planledger import BlobPlan, Ledger


class Scheduler:
    """Starts jobs."""

    def __init__(self, ledger: Ledger, faults: Faults) -> None:
        self._ledger = ledger
        self._faults = faults
        self._limits = ledger.limits
        self._alarm = float("inf")

    def ticked(self) -> None:
        """The alarm went off."""
        self._alarm = float("inf")

    def run(self, now: float) -> None:
        """Start what may be started now."""
        ready = [blob for blob in self._ledger.active_blobs() if not blob.failed and blob.retry_at <= now]
        for blob in ready:
            while blob.demand and self._start(blob, self._demand_run(blob), Priority.DEMAND, now):
                pass
        for blob in ready:
            if blob.wants:
                self._schedule_wants(blob, now)
        self._schedule_fill(now)
        for blob in self._ledger.active_blobs():
            if not (blob.demand or blob.wants or blob.fill or blob.failed or blob.held):
                del self._ledger.active[blob.id]
        self._set_alarm(now)

    def _demand_run(self, blob: BlobPlan) -> ChunkSpan:
        start = stop = next(iter(blob.demand))
        cap = max(1, self._limits.job_bytes // blob.shape.chunk_length)
        while stop in blob.demand and stop - start < cap:
            stop += 1
        return ChunkSpan(start, stop)

    def _schedule_wants(self, blob: BlobPlan, now: float) -> None:
        """Newest window first; each is cut so that a large one is on at least four connections."""
        while blob.wants:
            window = blob.wants[-1]
            cap = max(1, min(self._limits.job_bytes // blob.shape.chunk_length, -(-len(window) // 4)))
            hole = next(blob.taken.holes(window), None)
            if hole is None:
                blob.wants.pop()
                continue
            run = ChunkSpan(hole.start, min(hole.stop, hole.start + cap))
            if not self._start(blob, run, Priority.READAHEAD, now):
                return

    def _schedule_fill(self, now: float) -> None:
        for blob_id in list(self._ledger.filling):
            blob = self._ledger.blobs[blob_id]
            if blob.failed or blob.retry_at > now:
                continue
            while (run := self._fill_run(blob)) is not None:
                if not self._start(blob, run, Priority.FILL, now):
                    break
                blob.cursor = run.stop
            else:
                if blob.present.full:
                    self._ledger.set_fill(blob, on=False)

    def _fill_run(self, blob: BlobPlan) -> ChunkSpan | None:
        start = blob.taken.first_hole(blob.cursor)
        if start is None:
            start = blob.taken.first_hole(0)
        if start is None:
            return None
        target = blob.stream_rate * self._limits.fill_job_seconds or self._limits.first_job_bytes
        cap = max(1, min(self._limits.job_bytes, int(target)) // blob.shape.chunk_length)
        return next(blob.taken.holes(ChunkSpan(start, min(start + cap, blob.shape.chunk_count))))

    def _may_start(self, blob: BlobPlan, nbytes: int, priority: Priority) -> bool:
        limits, jobs = self._limits, self._ledger.jobs
        if len(jobs) >= limits.max_jobs:
            return False
        if priority is Priority.DEMAND:
            return not blob.unsettled or blob.unsettled + nbytes <= limits.unsettled_bytes
        background = sum(1 for job in jobs.values() if job.priority is not Priority.DEMAND)
        if background >= limits.background_jobs:
            return False
        if priority is Priority.FILL and self._ledger.waiters:
            fills = sum(1 for job in jobs.values() if job.priority is Priority.FILL)
            if fills >= limits.fill_jobs_under_demand:
                return False
        if self._ledger.inflight and self._ledger.inflight + nbytes > limits.budget_bytes:
            return False
        return not blob.unsettled or blob.unsettled + nbytes <= limits.background_unsettled_bytes

    def _start(self, blob: BlobPlan, run: ChunkSpan, priority: Priority, now: float) -> bool:
        """Begin a job for `run`, shortened to what the bounds allow; False if none may begin now."""
        avoid = self._faults.avoid(blob, run.start)
        ranged = avoid | blob.streamers
        if len(ranged) >= len(blob.mirrors) and blob.streamers - avoid:
            return self._start_whole(blob, priority, avoid, now)
        while len(run) > 1 and not self._may_start(blob, len(blob.shape.bytes_of(run)), priority):
            run = ChunkSpan(run.start, run.start + len(run) // 2)
        if not self._may_start(blob, len(blob.shape.bytes_of(run)), priority):
            return False
        mirror = blob.board.choose(now, frozenset(ranged))
        if mirror is None:
            self._faults.no_mirror(blob, run.start, now)
            return blob.failed is None  # the chunk is held: the others may go on
        later = (chunk for chunk in run if chunk > run.start and self._shuns(blob, chunk, mirror))
        run = ChunkSpan(run.start, next(later, run.stop))
        self._issue(blob, run, frozenset(run), mirror, priority, now, whole=False)
        return True

    def _shuns(self, blob: BlobPlan, chunk: int, mirror: int) -> bool:
        return chunk in blob.mismatches and mirror in self._faults.avoid(blob, chunk)

    def _start_whole(self, blob: BlobPlan, priority: Priority, avoid: frozenset[int], now: float) -> bool:
        """No origin has ranges: one stream of everything at a time; waits until nothing else is in flight."""
        if blob.owner or len(self._ledger.jobs) >= self._limits.max_jobs:
            return False
        others = frozenset(range(len(blob.mirrors))) - blob.streamers
        mirror = blob.board.choose(now, avoid | others)
        if mirror is None:
            return False
        holes = frozenset(chunk for hole in blob.taken.holes(blob.shape.chunks) for chunk in hole)
        self._issue(blob, blob.shape.chunks, holes, mirror, priority, now, whole=True)
        return True

    def _issue(
        self,
        blob: BlobPlan,
        span: ChunkSpan,
        chunks: frozenset[int],
        mirror: int,
        priority: Priority,
        now: float,
        *,
        whole: bool,
    ) -> None:
        job = self._ledger.new_job(blob, chunks, mirror, priority, now, whole=whole)
        self._ledger.issue(blob, span, chunks, job)

    def _alarms(self, now: float) -> Iterator[float]:
        for blob in self._ledger.active_blobs():
            if blob.failed:
                yield blob.failed[0]
            elif blob.retry_at > now and (blob.demand or blob.wants or blob.fill):
                yield blob.retry_at
            yield from (until for until, _ in blob.held.values())

    def _set_alarm(self, now: float) -> None:
        due = min(self._alarms(now), default=float("inf"))
        if due < self._alarm:
            self._alarm = due
            self._ledger.out.append(plan.SleepUntil(due))

"""What to fetch next: what readers wait for, then read-ahead, then fill, within the bounds of `Limits`.

Rules:

- Fill and read-ahead never take demand's own slots, and stop at the background bounds of `Limits`.
- Blobs with demand take turns, one job each; so do those with read-ahead. Fill completes one blob after another.
- A blob that cannot start anything for a reason of its own leaves the line, and comes back when something happens to
  it (an event of its own, or a timer). So an event never costs a look at every blob.
- Room is reserved when a job begins. A blob whose demand does not fit leaves the line until there is more room;
  background that does not fit keeps all of its priority waiting.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.plan import Failure, Priority
from weightfs.core.planfaults import Faults
from weightfs.core.planledger import BlobPlan, Ledger
from weightfs.core.planqueue import Line


class _Outcome(enum.Enum):
    GO_ON = enum.auto()  # something was started, or put off for good: look again
    BLOCKED = enum.auto()  # nothing of this blob before something happens to it
    FULL = enum.auto()  # nothing of this priority before something happens


class Scheduler:
    """Starts jobs, and says when to wake up."""

    def __init__(self, ledger: Ledger, faults: Faults) -> None:
        self._ledger = ledger
        self._faults = faults
        self._limits = ledger.limits
        self._demand: Line[BlobPlan] = Line()
        self._wants: Line[BlobPlan] = Line()
        self._fill: Line[BlobPlan] = Line()
        self._last = 0  # ranks given at the end of a line …
        self._front = 0  # … and at its front
        self._alarm = float("inf")
        self._background = True

    def set_background(self, on: bool) -> None:
        """Whether anything may be begun that no reader waits for."""
        self._background = on

    def set_fill(self, blob: BlobPlan, on: bool) -> None:
        """Put the blob at the end of the line for fill (if it is not in it), or take it out."""
        if on and not blob.fill:
            blob.fill_rank = self._next_rank()
        blob.fill = on
        self._ask_again(blob)

    def set_paused(self, blob: BlobPlan, on: bool) -> None:
        """Hold its fill back, or let it go on."""
        blob.paused = on
        self._ask_again(blob)
        if on:
            streams = (job for job in self._ledger.jobs.values() if job.blob is blob and job.whole)
            idle = [job for job in streams if job.issued is Priority.FILL and not blob.waiting]
            self._ledger.out.extend(plan.Stop(job.id) for job in idle)

    def _ask_again(self, blob: BlobPlan) -> None:
        if self._ledger.room.short.get(blob, Priority.DEMAND) is not Priority.DEMAND:
            del self._ledger.room.short[blob]  # asked again, `NeedRoom` is said again

    def favour(self, blob: BlobPlan) -> None:
        """Somebody reads it: its fill goes first."""
        if blob.fill:
            self._front -= 1
            blob.fill_rank = self._front

    def remove(self, blob: BlobPlan) -> None:
        """The blob has gone."""
        for line in (self._demand, self._wants, self._fill):
            line.leave(blob)

    def run(self, now: float) -> None:
        """Start what may be started now."""
        self._look_again()
        for blob in self._ledger.touched:
            if not blob.gone:
                self._put_in_line(blob)
        self._ledger.touched = {}
        self._serve(self._demand, self._start_demand, now, in_turns=True)
        if not self._background:
            return
        self._serve(self._wants, self._start_want, now, in_turns=True)
        self._serve(self._fill, self._start_fill, now, in_turns=False)

    def set_alarm(self, now: float, *, ticked: bool) -> None:
        """Ask for a `Tick` at the next time that matters, unless an earlier one is under way."""
        if ticked or now >= self._alarm:
            self._alarm = float("inf")
        due = self._ledger.timers.next()
        if due < self._alarm:
            self._alarm = due
            self._ledger.out.append(plan.SleepUntil(due))

    # ---- room

    def set_capacity(self, demand: int | None, background: int | None) -> None:
        """What may be held from now on."""
        room = self._ledger.room
        room.demand, room.background, room.changed = demand, background, True

    def refuse(self, failure: Failure) -> None:
        """There is no more room: tell the readers of what does not fit. Background goes on waiting."""
        short = self._ledger.room.short
        for blob in [blob for blob, priority in short.items() if priority is Priority.DEMAND]:
            del short[blob]
            self._ledger.wake_failed(
                blob, [chunk for chunk in blob.demand if chunk not in blob.kept], failure
            )

    def _look_again(self) -> None:
        """There may be room for what did not fit."""
        room = self._ledger.room
        if room.changed:
            self._ledger.touched.update(dict.fromkeys(room.short))
            room.short.clear()
            room.changed = False

    def _fits(self, blob: BlobPlan, chunks: Iterable[int], priority: Priority) -> bool:
        room = self._ledger.room
        most = room.demand if priority is Priority.DEMAND else room.background
        cost = self._ledger.cost(blob, chunks)
        return most is None or not cost or self._ledger.held + cost <= most

    def _short(self, blob: BlobPlan, chunks: Iterable[int], priority: Priority) -> _Outcome:
        room = self._ledger.room
        blob.lacking = self._ledger.cost(blob, chunks)
        if room.short.get(blob, priority + 1) > priority:
            room.short[blob] = priority
            self._ledger.out.append(plan.NeedRoom(blob.id, priority))
        return _Outcome.BLOCKED if priority is Priority.DEMAND else _Outcome.FULL

    # ---- lines

    def _next_rank(self) -> int:
        self._last += 1
        return self._last

    def _put_in_line(self, blob: BlobPlan) -> None:
        for line, something in ((self._demand, blob.demand), (self._wants, blob.wants)):
            if something and blob not in line:
                line.put(blob, self._next_rank())
        if blob.fill:
            self._fill.put(blob, blob.fill_rank)

    def _serve(
        self,
        line: Line[BlobPlan],
        start: Callable[[BlobPlan, float], _Outcome],
        now: float,
        *,
        in_turns: bool,
    ) -> None:
        while (blob := line.first()) is not None:
            match start(blob, now):
                case _Outcome.FULL:
                    return
                case _Outcome.BLOCKED:
                    line.leave(blob)
                case _Outcome.GO_ON if in_turns:
                    line.put(blob, self._next_rank())

    @staticmethod
    def _paused(blob: BlobPlan, now: float) -> bool:
        return blob.failed is not None or blob.ghosts > 0 or blob.retry_at > now

    # ---- the three priorities

    def _start_demand(self, blob: BlobPlan, now: float) -> _Outcome:
        if not blob.demand or self._paused(blob, now):
            return _Outcome.BLOCKED
        start = stop = next(iter(blob.demand))
        cap = max(1, self._limits.job_bytes // blob.shape.chunk_length)
        while stop in blob.demand and stop - start < cap:
            stop += 1
        return self._start(blob, ChunkSpan(start, stop), Priority.DEMAND, now)

    def _start_want(self, blob: BlobPlan, now: float) -> _Outcome:
        """Newest window first; each is cut so that a large one is on at least four connections."""
        if self._gives_way(blob, now):
            return _Outcome.BLOCKED
        while blob.wants:
            window = blob.wants[-1]
            cap = max(1, min(self._limits.job_bytes // blob.shape.chunk_length, -(-len(window) // 4)))
            hole = next(blob.taken.holes(window), None)
            if hole is not None:
                run = ChunkSpan(hole.start, min(hole.stop, hole.start + cap))
                return self._start(blob, run, Priority.READAHEAD, now)
            blob.wants.pop()
        return _Outcome.BLOCKED

    def _start_fill(self, blob: BlobPlan, now: float) -> _Outcome:
        if not blob.fill or blob.paused or self._gives_way(blob, now):
            return _Outcome.BLOCKED
        start = blob.taken.first_hole(blob.cursor)
        if start is None:
            start = blob.taken.first_hole(0)
        if start is None:
            return _Outcome.BLOCKED
        target = blob.stream_rate * self._limits.fill_job_seconds or self._limits.first_job_bytes
        cap = max(1, min(self._limits.job_bytes, int(target)) // blob.shape.chunk_length)
        window = ChunkSpan(start, min(start + cap, blob.shape.chunk_count))
        return self._start(blob, next(blob.taken.holes(window)), Priority.FILL, now)

    def _gives_way(self, blob: BlobPlan, now: float) -> bool:
        """Background of a blob also waits while one of its readers waits for a whole stream."""
        return self._paused(blob, now) or (blob.draining and bool(blob.demand))

    # ---- one job

    def _start(self, blob: BlobPlan, run: ChunkSpan, priority: Priority, now: float) -> _Outcome:
        """Begin a job for `run`, shortened to what the bounds allow."""
        if self._no_slot(priority):
            return _Outcome.FULL
        mirrors = self._faults.candidates(blob, run.start, now)
        if not mirrors:
            return (
                _Outcome.GO_ON
            )  # the chunk is held or put off, or the blob is: either is seen at the next look
        ranged = mirrors - blob.streamers
        if not ranged:
            return self._start_whole(blob, mirrors, priority, now)
        while not self._within_bytes(blob, run, priority):
            if len(run) == 1:
                return _Outcome.BLOCKED if self._unsettled(blob, run, priority) else _Outcome.FULL
            run = ChunkSpan(run.start, run.start + len(run) // 2)
        while not self._fits(blob, run, priority):
            if len(run) == 1:
                return self._short(blob, run, priority)
            run = ChunkSpan(run.start, run.start + len(run) // 2)
        mirror = self._choose(blob, ranged, now)
        shunned = (c for c in run if c > run.start and self._shuns(blob, c, mirror, now))
        run = ChunkSpan(run.start, next(shunned, run.stop))
        self._ledger.issue(blob, run, run, mirror, priority, now)
        return _Outcome.GO_ON

    def _start_whole(
        self, blob: BlobPlan, mirrors: frozenset[int], priority: Priority, now: float
    ) -> _Outcome:
        """No ranges to be had: one stream of everything at a time; it waits until nothing else is in flight."""
        if blob.owner:
            blob.draining = blob.draining or priority is Priority.DEMAND
            return _Outcome.BLOCKED
        blob.draining = False
        mirror = self._choose(blob, mirrors, now)
        absent = (chunk for hole in blob.taken.holes(blob.shape.chunks) for chunk in hole)
        chunks = [chunk for chunk in absent if not self._shuns(blob, chunk, mirror, now)]
        if not self._fits(blob, chunks, priority):
            return self._short(blob, chunks, priority)
        self._ledger.issue(blob, blob.shape.chunks, chunks, mirror, priority, now, whole=True)
        return _Outcome.GO_ON

    @staticmethod
    def _choose(blob: BlobPlan, mirrors: frozenset[int], now: float) -> int:
        others = frozenset(range(len(blob.mirrors))) - mirrors
        mirror = blob.board.choose(now, others)
        assert mirror is not None  # `mirrors` is not empty
        return mirror

    def _shuns(self, blob: BlobPlan, chunk: int, mirror: int, now: float) -> bool:
        return chunk in blob.mismatches and mirror in self._faults.avoid(blob, chunk, now)

    # ---- bounds

    def _no_slot(self, priority: Priority) -> bool:
        limits, jobs = self._limits, self._ledger.jobs.values()
        if len(jobs) >= limits.max_jobs:
            return True
        if priority is Priority.DEMAND:
            return False
        # By the priority with which they were issued: a background job keeps its slot although a reader waits for it.
        if sum(1 for job in jobs if job.issued is not Priority.DEMAND) >= limits.background_jobs:
            return True
        if priority is Priority.READAHEAD or not self._ledger.waiters:
            return False
        return sum(1 for job in jobs if job.issued is Priority.FILL) >= limits.fill_jobs_under_demand

    def _within_bytes(self, blob: BlobPlan, run: ChunkSpan, priority: Priority) -> bool:
        if self._unsettled(blob, run, priority):
            return False
        alone = not self._ledger.inflight and len(run) == 1
        flying = self._ledger.inflight + len(blob.shape.bytes_of(run))
        return priority is Priority.DEMAND or alone or flying <= self._limits.budget_bytes

    def _unsettled(self, blob: BlobPlan, run: ChunkSpan, priority: Priority) -> bool:
        """Whether too much of the blob would not be durable. A chunk larger than the bound goes alone."""
        limits = self._limits
        most = limits.unsettled_bytes if priority is Priority.DEMAND else limits.background_unsettled_bytes
        alone = not blob.unsettled and len(run) == 1
        return not alone and blob.unsettled + len(blob.shape.bytes_of(run)) > most

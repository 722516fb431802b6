"""What the planner does about faults: which mirrors to ask, when to pause, what to give up and for how long.

Rules:

- Nothing is given up for ever. A chunk or a blob is held, a mirror is dead, for a bounded time that doubles with each
  time; then it is tried again. So one honest mirror is reached in the end, whatever happened before.
- One trouble counts once: what a job says is news only if the job was issued after the last counted failure of its
  mirror (`seen`) and after the blob's last pause (`first_job`). Job numbers tell, not clocks.
- A round ends, with a growing pause, when every living mirror had its turn (`tried`) and failed since bytes last came.
  Mirrors without ranges (`streamers`) take turns only after a round of the others (`desperate`).
- A mirror is not asked before the end of its Retry-After (`later`).
- Nobody's fault (worker, cancelled, cache) is blamed on a mirror.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightfs.core import plan
from weightfs.core.plan import Failure
from weightfs.core.planledger import PAST, BlobPlan, Job, Ledger
from weightfs.core.retry import delay, is_permanent
from weightfs.errors import FailureKind

_BLOB = -1  # in place of a chunk number: the blob as a whole
_DISK = -2  # the same, where chunks land and cannot be recorded


class Faults:
    """Failures in; holds and pauses in the ledger, and the commands that tell of them, out."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._limits = ledger.limits

    # ---- what happened

    def mismatched(self, job: Job, chunk: int, failure: Failure, now: float) -> None:
        """Count wrong bytes against the mirror, for this chunk."""
        blob = job.blob
        self._ledger.free(job, [chunk])
        blob.board.failed(job.mirror, FailureKind.MISMATCH, now)
        counts = blob.mismatches.setdefault(chunk, {})
        count = counts.get(job.mirror, (0, PAST))[0] + 1
        counts[job.mirror] = (count, now + self._growing(count - 1))
        if len(self.avoid(blob, chunk, now)) >= len(blob.mirrors):
            self._hold(blob, chunk, failure, now)

    def refuted(self, blob: BlobPlan, sources: Mapping[int, int], now: float) -> None:
        """Ask others for these chunks: the whole is wrong, and each came from this mirror."""
        for chunk, mirror in sources.items():
            blob.mismatches.setdefault(chunk, {})[mirror] = (1, now + self._limits.hold_cap)

    def failed(self, job: Job, failure: Failure, jitter: float, now: float) -> None:
        """A job of a living blob ended badly; it is out of the ledger already."""
        blob = job.blob
        blob.trouble = failure
        match failure.kind:
            case FailureKind.CANCELLED:
                if (
                    job.trim_at is None
                ):  # nobody asked for it: whoever does that again and again must not spin
                    self.pause(blob, now + self._limits.backoff_base, now)
            case FailureKind.NO_RANGES if not job.whole:
                blob.streamers.add(job.mirror)
            case FailureKind.NO_SPACE | FailureKind.DISK:
                if job.id >= blob.first_job:
                    self._give_up(blob, failure, now)
            case FailureKind.WORKER:
                if job.id >= blob.first_job:
                    self._worker_died(blob, job.mirror, failure, jitter, now)
            case _:
                self._mirror_failed(blob, job, failure, jitter, now)

    def ended_early(self, job: Job, now: float) -> None:
        """The job said that it is done, and had not landed all: a turn of its mirror, which must not spin."""
        self._take_turn(job.blob, job.mirror, now)
        self.pause(job.blob, now + self._limits.backoff_base, now)

    def succeeded(self, job: Job, chunk: int, now: float) -> None:
        """A chunk landed. A job that is older than the trouble says nothing about the trouble."""
        blob, nbytes = job.blob, job.blob.chunk_bytes(chunk)
        seconds = max(now - job.started, 1e-6) * nbytes / max(job.landed_bytes, 1)
        blob.board.succeeded(job.mirror, nbytes, seconds)
        blob.mismatches.pop(chunk, None)
        blob.holds.pop(chunk, None)
        if job.id >= max(blob.first_job, blob.seen.get(job.mirror, 0)):
            blob.rounds = blob.worker_deaths = 0
            blob.desperate = False
            blob.trouble = None
            blob.tried.clear()
            blob.strikes.pop(job.mirror, None)
            blob.burials.pop(job.mirror, None)
            blob.holds.pop(_BLOB, None)

    def recorded(self, blob: BlobPlan) -> None:
        """Chunks became durable."""
        blob.holds.pop(_DISK, None)

    def unrecorded(self, blob: BlobPlan, failure: Failure, now: float) -> None:
        """The cache could not keep what landed. That chunks land says nothing about it: such holds count apart."""
        self._give_up(blob, failure, now, _DISK)

    def forgive(self, blob: BlobPlan) -> None:
        """Forget all past faults: the mirrors are new."""
        blob.rounds = blob.worker_deaths = 0
        blob.desperate = False
        blob.first_job = self._ledger.next_job
        blob.retry_at = PAST
        blob.failed = None
        for memory in (blob.tried, blob.streamers):
            memory.clear()
        for book in (blob.later, blob.dead, blob.strikes, blob.burials, blob.mismatches, blob.holds):
            book.clear()
        for chunk in [*blob.held, *blob.parked]:
            self._unhold(blob, chunk)

    def release(self, now: float) -> None:
        """What was given up or put off, and has waited long enough, may be tried again."""
        for blob, chunk in self._ledger.timers.due(now):
            if blob.gone:
                continue
            self._ledger.touched[blob] = None
            if chunk == _BLOB:
                if blob.failed and blob.failed[0] <= now:
                    blob.failed = None
                    blob.dead.clear()
                    blob.strikes.clear()
            elif blob.parked.get(chunk, now + 1) <= now or (
                chunk in blob.held and blob.held[chunk][0] <= now
            ):
                self._unhold(blob, chunk)

    # ---- whom to ask

    def avoid(self, blob: BlobPlan, chunk: int, now: float) -> frozenset[int]:
        """The mirrors that are not to be asked for this chunk: dead, or they gave wrong bytes for it."""
        seen = {m: count for m, (count, until) in blob.mismatches.get(chunk, {}).items() if until > now}
        bad = {mirror for mirror, (until, _) in blob.dead.items() if until > now}
        bad |= {mirror for mirror, count in seen.items() if count >= self._limits.mismatches_per_mirror}
        # A mirror that gave one wrong chunk is asked for it again only if no other is left to ask.
        careful = bad | seen.keys()
        return frozenset(careful if len(careful) < len(blob.mirrors) else bad)

    def candidates(self, blob: BlobPlan, chunk: int, now: float) -> frozenset[int]:
        """The mirrors to choose from now. If there is none, the chunk is held or put off, or the blob is."""
        living = self._all(blob) - self.avoid(blob, chunk, now)
        if not living:
            self._no_mirror(blob, chunk, now)
            return frozenset()
        ready = self._ready(blob, living, now)
        if not ready:
            if chunk in blob.mismatches:
                self._park(blob, chunk, min(blob.later[mirror] for mirror in living))
            else:
                self.pause(blob, self._soonest(blob), now)
            return frozenset()
        # All had their turn and no pause: those that are left for this chunk alone. Failing again ends the round.
        return self._with_turn(blob, ready) - blob.tried or self._with_turn(blob, ready)

    def pause(self, blob: BlobPlan, until: float, now: float) -> None:
        """Start nothing of the blob before `until`."""
        blob.first_job = self._ledger.next_job
        if until > max(now, blob.retry_at):
            blob.retry_at = until
            self._ledger.timers.add(until, blob)

    # ----

    @staticmethod
    def _all(blob: BlobPlan) -> frozenset[int]:
        return frozenset(range(len(blob.mirrors)))

    def _living(self, blob: BlobPlan, now: float) -> frozenset[int]:
        return frozenset(m for m in self._all(blob) if m not in blob.dead or blob.dead[m][0] <= now)

    @staticmethod
    def _ready(blob: BlobPlan, mirrors: frozenset[int], now: float) -> frozenset[int]:
        return frozenset(mirror for mirror in mirrors if blob.later.get(mirror, now) <= now)

    def _soonest(self, blob: BlobPlan) -> float:
        """When the first mirror may be asked again: its Retry-After over, and not dead any more."""
        alive = {mirror: until for mirror, (until, _) in blob.dead.items()}
        return min(max(blob.later.get(m, PAST), alive.get(m, PAST)) for m in self._all(blob))

    @staticmethod
    def _with_turn(blob: BlobPlan, ready: frozenset[int]) -> frozenset[int]:
        """A whole stream blocks everything else of the blob: not because one range failed once."""
        ranged = ready - blob.streamers
        return ranged if ranged and not blob.desperate else ready

    def _mirror_failed(self, blob: BlobPlan, job: Job, failure: Failure, jitter: float, now: float) -> None:
        mirror = job.mirror
        blob.board.failed(mirror, failure.kind, now, failure.retry_after)
        if failure.retry_after is not None:
            base = self._limits.backoff_base
            wait = delay(0, base=base, cap=0.0, retry_after=failure.retry_after, jitter=jitter)
            blob.later[mirror] = max(now + wait, blob.later.get(mirror, PAST))
        news = job.id >= max(blob.first_job, blob.seen.get(mirror, 0))
        living = self._living(blob, now)
        if living and not blob.failed and not self._ready(blob, living, now):
            self.pause(blob, self._soonest(blob), now)
        if not news:
            return
        blob.seen[mirror] = self._ledger.next_job
        if is_permanent(failure.kind) or self._struck_out(blob, mirror, failure.kind):
            self._bury(blob, mirror, failure, now)
        else:
            self._turn_failed(blob, mirror, failure, jitter, now)

    def _struck_out(self, blob: BlobPlan, mirror: int, kind: FailureKind) -> bool:
        if kind not in (FailureKind.PROTOCOL, FailureKind.NO_RANGES):
            return False
        blob.strikes[mirror] = blob.strikes.get(mirror, 0) + 1
        return blob.strikes[mirror] >= self._limits.protocol_strikes

    def _bury(self, blob: BlobPlan, mirror: int, failure: Failure, now: float) -> None:
        count = blob.burials[mirror] = blob.burials.get(mirror, 0) + 1
        blob.dead[mirror] = (now + self._growing(count - 1), failure)
        blob.strikes.pop(mirror, None)
        if not self._living(blob, now):
            self._give_up(blob, failure, now)

    def _turn_failed(self, blob: BlobPlan, mirror: int, failure: Failure, jitter: float, now: float) -> None:
        again = mirror in blob.tried
        if self._take_turn(blob, mirror, now) or again:
            blob.rounds += 1
            blob.tried.clear()
            self._retry_or_give_up(blob, blob.rounds, failure, jitter, now)

    def _take_turn(self, blob: BlobPlan, mirror: int, now: float) -> bool:
        """Whether every mirror that may be asked has now had its turn; then they all may have another."""
        blob.tried.add(mirror)
        ready = self._ready(blob, self._living(blob, now), now)
        if not self._with_turn(blob, ready) <= blob.tried:
            return False
        blob.tried.clear()
        blob.desperate = True
        return True

    def _worker_died(self, blob: BlobPlan, mirror: int, failure: Failure, jitter: float, now: float) -> None:
        self._take_turn(blob, mirror, now)  # not blamed; but if its answers kill workers, others go first
        blob.worker_deaths += 1
        if blob.worker_deaths == 1 and self._limits.max_retries != 0:
            blob.first_job = (
                self._ledger.next_job
            )  # at once, on another worker; its other jobs die of the same
        else:
            self._retry_or_give_up(blob, blob.worker_deaths, failure, jitter, now)

    def _retry_or_give_up(
        self, blob: BlobPlan, tries: int, failure: Failure, jitter: float, now: float
    ) -> None:
        limits = self._limits
        if limits.max_retries is not None and tries > limits.max_retries:
            self._give_up(blob, failure, now)
            return
        base, cap = limits.backoff_base, limits.backoff_cap
        wait = delay(tries - 1, base=base, cap=cap, retry_after=None, jitter=jitter)
        self.pause(blob, now + wait, now)

    # ---- holds

    def _growing(self, count: int) -> float:
        return min(self._limits.hold_cap, self._limits.hold_base * 2.0 ** min(count, 16))

    def _hold_time(self, blob: BlobPlan, chunk: int) -> float:
        count = blob.holds.get(chunk, 0)
        blob.holds[chunk] = count + 1
        return self._growing(count)

    def _no_mirror(self, blob: BlobPlan, chunk: int, now: float) -> None:
        if not blob.mirrors:
            self._give_up(blob, Failure(FailureKind.NOT_FOUND, "no mirror is known for this file"), now)
            return
        dead = next((failure for until, failure in blob.dead.values() if until > now), None)
        wrong = Failure(FailureKind.MISMATCH, "every mirror gave other bytes than the chunk list says")
        self._hold(blob, chunk, dead or wrong, now)

    def _hold(self, blob: BlobPlan, chunk: int, failure: Failure, now: float) -> None:
        failure = replace(failure, chunk=chunk)
        until = now + self._hold_time(blob, chunk)
        blob.held[chunk] = (until, failure)
        self._ledger.take(blob, chunk)
        self._ledger.timers.add(until, blob, chunk)
        self._ledger.wake_failed(blob, [chunk], failure)
        self._ledger.out.append(plan.GaveUp(blob.id, failure, until))

    def _park(self, blob: BlobPlan, chunk: int, until: float) -> None:
        """The only mirrors left for this chunk named a later time: its readers wait, the other chunks go on."""
        blob.parked[chunk] = until
        self._ledger.take(blob, chunk)
        self._ledger.timers.add(until, blob, chunk)

    def _unhold(self, blob: BlobPlan, chunk: int) -> None:
        if blob.parked.pop(chunk, None) is None:
            del blob.held[chunk]
            blob.mismatches.pop(chunk, None)
        self._ledger.available(blob, chunk)

    def _give_up(self, blob: BlobPlan, failure: Failure, now: float, why: int = _BLOB) -> None:
        failure = replace(failure, chunk=-1)
        until = now + self._hold_time(blob, why)
        if blob.failed:  # what is held for another reason is not tried sooner for this one
            until = max(until, blob.failed[0])
        blob.failed = (until, failure)
        blob.rounds = blob.worker_deaths = 0
        blob.first_job = self._ledger.next_job
        self._ledger.timers.add(until, blob)
        self._ledger.wake_failed(blob, list(blob.waiting), failure)
        self._ledger.out.append(plan.GaveUp(blob.id, failure, until))

"""What the planner does about faults: which mirrors to avoid, when to pause, what to give up and for how long.

Rule: nothing is given up for ever. A chunk or a blob is held for a bounded, growing time, during which its readers are
told the failure at once; then it is tried again with a clean slate.
"""

from __future__ import annotations

from weightfs.core import plan
from weightfs.core.plan import Failure
from weightfs.core.planledger import BlobPlan, Job, Ledger
from weightfs.core.retry import delay, is_permanent
from weightfs.errors import FailureKind


class Faults:
    """Failures in; holds and pauses in the ledger, and the commands that tell of them, out."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._limits = ledger.limits

    def mismatched(self, job: Job, chunk: int, failure: Failure, now: float) -> None:
        """Count wrong bytes against the mirror, for this chunk."""
        if chunk not in job.outstanding:
            return
        self._ledger.free(job, [chunk])
        blob = self._ledger.blobs.get(job.blob)
        if blob is None:
            return
        blob.board.failed(job.mirror, FailureKind.MISMATCH, now)
        counts = blob.mismatches.setdefault(chunk, {})
        counts[job.mirror] = counts.get(job.mirror, 0) + 1
        if len(self.avoid(blob, chunk)) >= len(blob.mirrors):
            self._hold(blob, chunk, failure, now)

    def failed(self, job: Job, failure: Failure, jitter: float, now: float) -> None:
        """A job ended badly."""
        self._ledger.end(job, now)
        blob = self._ledger.blobs.get(job.blob)
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

    def succeeded(self, blob: BlobPlan, job: Job, chunk: int) -> None:
        """Bytes came: what was held against the mirror and the chunk is forgotten."""
        blob.attempt = 0
        blob.retry_at = float("-inf")
        blob.strikes.pop(job.mirror, None)
        blob.mismatches.pop(chunk, None)
        blob.holds.pop(chunk, None)
        blob.holds.pop(-1, None)

    def forgive(self, blob: BlobPlan) -> None:
        """Forget all past faults: the mirrors are new."""
        blob.dead.clear()
        blob.strikes.clear()
        blob.mismatches.clear()
        blob.holds.clear()
        blob.failed = None
        for chunk in list(blob.held):
            self._unhold(blob, chunk)

    def avoid(self, blob: BlobPlan, chunk: int) -> frozenset[int]:
        """The mirrors that are not to be asked for this chunk."""
        seen = blob.mismatches.get(chunk, {})
        bad = {mirror for mirror, count in seen.items() if count >= self._limits.mismatches_per_mirror}
        if len(bad | blob.dead.keys()) < len(blob.mirrors):
            # A mirror that gave one wrong chunk is asked for it again only if no other is left to ask.
            tried = bad | seen.keys() | blob.dead.keys()
            bad = tried if len(tried) < len(blob.mirrors) else bad
        return frozenset(bad | blob.dead.keys())

    def no_mirror(self, blob: BlobPlan, chunk: int, now: float) -> None:
        """Nobody is left to ask for this chunk."""
        if not blob.mirrors:
            self._give_up(blob, Failure(FailureKind.NOT_FOUND, "no mirror is known for this file"), now)
            return
        failure = next(iter(blob.dead.values()), None)
        text = failure.text if failure else "every mirror gave other bytes than the chunk list says"
        kind = failure.kind if failure else FailureKind.MISMATCH
        self._hold(blob, chunk, Failure(kind, text, failure.mirror if failure else "", None, chunk), now)

    def release_holds(self, now: float) -> None:
        """What was given up and has waited long enough may be tried again."""
        for blob in self._ledger.active_blobs():
            if blob.failed and blob.failed[0] <= now:
                blob.failed = None
                blob.dead.clear()
                blob.strikes.clear()
                blob.retry_at = now
            if blob.held:
                for chunk in [chunk for chunk, (until, _) in blob.held.items() if until <= now]:
                    self._unhold(blob, chunk)

    def _struck_out(self, blob: BlobPlan, mirror: int, kind: FailureKind) -> bool:
        if kind not in (FailureKind.PROTOCOL, FailureKind.NO_RANGES):
            return False
        blob.strikes[mirror] = blob.strikes.get(mirror, 0) + 1
        return blob.strikes[mirror] >= self._limits.protocol_strikes

    def _back_off(self, blob: BlobPlan, job: Job, failure: Failure, jitter: float, now: float) -> None:
        """Wait before the next try once every living mirror had its turn since bytes last came."""
        if job.started < blob.last_failure:
            return  # issued before the last counted failure: the same trouble seen twice
        blob.last_failure = now
        blob.attempt += 1
        alive = max(1, len(blob.mirrors) - len(blob.dead))
        rounds, turn = divmod(blob.attempt, alive)
        if self._limits.max_retries is not None and rounds > self._limits.max_retries:
            self._give_up(blob, failure, now)
            return
        if turn == 0:
            base, cap = self._limits.backoff_base, self._limits.backoff_cap
            pause = delay(rounds - 1, base=base, cap=cap, retry_after=failure.retry_after, jitter=jitter)
            blob.retry_at = now + pause

    def _hold_time(self, blob: BlobPlan, chunk: int) -> float:
        count = blob.holds.get(chunk, 0)
        blob.holds[chunk] = count + 1
        return min(self._limits.hold_cap, self._limits.hold_base * 2.0 ** min(count, 16))

    def _hold(self, blob: BlobPlan, chunk: int, failure: Failure, now: float) -> None:
        until = now + self._hold_time(blob, chunk)
        blob.held[chunk] = (until, failure)
        self._ledger.active[blob.id] = None
        blob.taken.add(chunk)
        blob.demand.pop(chunk, None)
        self._ledger.wake_failed(blob, [chunk], failure)
        self._ledger.out.append(plan.GaveUp(blob.id, failure, until))

    def _give_up(self, blob: BlobPlan, failure: Failure, now: float) -> None:
        until = now + self._hold_time(blob, -1)
        blob.failed = (until, failure)
        self._ledger.active[blob.id] = None
        blob.attempt = 0
        self._ledger.wake_failed(blob, list(blob.waiting), failure)
        self._ledger.out.append(plan.GaveUp(blob.id, failure, until))

    def _unhold(self, blob: BlobPlan, chunk: int) -> None:
        del blob.held[chunk]
        self._ledger.available(blob, chunk)
        blob.mismatches.pop(chunk, None)

"""Which mirror of a blob to ask next: pure book-keeping, no clock of its own (`now` is monotonic seconds).

Rule: choosing never fails while a mirror is allowed. A bench is bounded and only orders the mirrors; when all
of them are benched, the one that comes back first is given, so that one honest mirror is always reached in
the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightfs.core.manifest import Mirror
from weightfs.core.ref import without_secrets
from weightfs.core.retry import RETRY_AFTER_CAP, blames_mirror, is_permanent
from weightfs.errors import FailureKind

FAULT_HALF_LIFE = 300.0  # seconds after which an old fault counts half
REMEASURE_AFTER = (
    300.0  # a speed not used for so long is forgotten: a mirror that was once slow gets another chance
)
RATE_WEIGHT = 0.3  # of the newest measurement in the moving average

# (first, longest) bench in seconds; each further incident doubles it
_BENCH = (1.0, 60.0)
_BENCH_PERMANENT = (10.0, 600.0)
_BENCH_MISMATCH = (60.0, 3600.0)  # wrong bytes cost a whole chunk each time, and may be malice


@dataclass(frozen=True, slots=True)
class MirrorScore:
    """One mirror as `status` shows it, without secrets. `rate`: bytes per second, None before a success."""

    url: str
    priority: int
    faults: int
    mismatches: int
    nbytes: int
    rate: float | None
    benched_until: float


@dataclass(slots=True)
class _Record:
    faults: int = 0
    mismatches: int = 0
    nbytes: int = 0
    rate: float | None = None
    benched_until: float = float("-inf")
    level: float = 0.0  # faults, decayed, as of `level_at`
    level_at: float = 0.0
    streak: int = 0  # incidents since the last success
    strikes: int = 0  # incidents with wrong bytes; a success does not excuse them
    chosen: int = 0  # turn in which it was chosen last: the least recent of equals goes next
    chosen_at: float = float("-inf")

    def level_now(self, now: float) -> float:
        decay: float = 0.5 ** (max(0.0, now - self.level_at) / FAULT_HALF_LIFE)
        return self.level * decay


def joined(known: Sequence[Mirror], fresh: Sequence[Mirror]) -> tuple[Mirror, ...]:
    """`known` in the same order, each as `fresh` has it (its validator may be newer), then what else is in `fresh`.

    Jobs in flight name mirrors by number: none changes its place, and none is taken away.
    """
    newest: dict[str, Mirror] = {}
    for mirror in fresh:
        newest.setdefault(mirror.url, mirror)
    kept = tuple(newest.get(mirror.url, mirror) for mirror in known)
    urls = {mirror.url for mirror in kept}
    return kept + tuple(mirror for url, mirror in newest.items() if url not in urls)


class MirrorBoard:
    """The mirrors of one blob and what is known about them. Indices are those of the sequence given."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self._mirrors = tuple(mirrors)
        self._records = [_Record() for _ in self._mirrors]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._mirrors)

    def choose(self, now: float, avoid: frozenset[int] = frozenset()) -> int | None:
        """The mirror to ask next, or None if `avoid` holds all of them.

        In this order: not benched, priority, faults (decayed, rounded), speed (unmeasured first, then by
        powers of two), the one chosen least recently: mirrors of about equal worth take turns.
        """
        allowed = [index for index in range(len(self._mirrors)) if index not in avoid]
        if not allowed:
            return None
        ready = [index for index in allowed if self._records[index].benched_until <= now]
        if ready:
            index = min(ready, key=lambda index: self._rank(index, now))
        else:
            index = min(allowed, key=lambda index: self._records[index].benched_until)
        self._turn += 1
        record = self._records[index]
        record.chosen, record.chosen_at = self._turn, now
        return index

    def succeeded(self, index: int, nbytes: int, seconds: float) -> None:
        """Note that a fetch of `nbytes` (verified) bytes took `seconds`."""
        record = self._records[index]
        record.nbytes += nbytes
        record.streak = 0
        if seconds > 0 and nbytes > 0:
            rate = nbytes / seconds
            record.rate = rate if record.rate is None else record.rate + RATE_WEIGHT * (rate - record.rate)

    def failed(self, index: int, kind: FailureKind, now: float, retry_after: float | None = None) -> None:
        """Note a failure. Kinds that are not the mirror's fault change nothing.

        Failures of a mirror that is benched already belong to the same incident (parallel jobs fail
        together): they prolong the bench from now on, but do not make it grow.
        """
        if not blames_mirror(kind):
            return
        record = self._records[index]
        record.faults += 1
        record.level, record.level_at = record.level_now(now) + 1.0, now
        new_incident = now >= record.benched_until
        if kind is FailureKind.MISMATCH:
            record.mismatches += 1
            record.strikes += new_incident or not record.strikes
            first, longest, times = *_BENCH_MISMATCH, record.strikes
        else:
            record.streak += new_incident or not record.streak
            first, longest = _BENCH_PERMANENT if is_permanent(kind) else _BENCH
            times = record.streak
        bench = min(longest, first * 2.0 ** min(times - 1, 32))
        if retry_after is not None:
            bench = max(bench, min(retry_after, RETRY_AFTER_CAP))
        record.benched_until = max(record.benched_until, now + bench)

    def snapshot(self) -> tuple[MirrorScore, ...]:
        """What is known about each mirror, in the order given."""
        return tuple(
            MirrorScore(
                url=without_secrets(mirror.url),
                priority=mirror.priority,
                faults=record.faults,
                mismatches=record.mismatches,
                nbytes=record.nbytes,
                rate=record.rate,
                benched_until=record.benched_until,
            )
            for mirror, record in zip(self._mirrors, self._records, strict=True)
        )

    def _rank(self, index: int, now: float) -> tuple[int, int, int, int]:
        record = self._records[index]
        measured = record.rate is not None and now - record.chosen_at < REMEASURE_AFTER
        # Measured rates are never equal; by powers of two, mirrors of about the same speed share the load.
        speed = int(record.rate).bit_length() if record.rate is not None and measured else 1_000
        return (self._mirrors[index].priority, round(record.level_now(now)), -speed, record.chosen)

"""A failed range is never answered twice at once, and never fetched again before its time.

With `MAP_POPULATE` the kernel asks for a page that got EIO again, at once and without end (12,000 times a second on
Linux 6.18). So a failing answer is held for at least `base` seconds, doubling up to `cap` while the same range goes on
failing. A read that comes meanwhile waits for the end of that time before it is tried: it costs no fetch, and it gets
the bytes if they have come, never an error from memory. Each failing answer thus takes `base` seconds or more from its
question. The table and the time that it remembers are bounded. Times are seconds of any monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from weightfs.core.geometry import ByteSpan

BASE = 1.0  # filesystem.md: hold each failing read >= 1 s
CAP = 16.0  # a reader with O_DIRECT cannot be killed while its answer is held
MEMORY = 120.0  # after this long without another failure the next one counts as the first
SLOTS = 512


@dataclass(frozen=True, slots=True)
class Sentence:
    """Answer `errno` at the time `until`; `failures` in a row so far. `news`: nobody was told of this one yet."""

    errno: int
    until: float
    failures: int
    news: bool


@dataclass(slots=True)
class _Record:
    span: ByteSpan
    whole: bool
    errno: int
    failures: int
    until: float  # no fetch before this time

    def hits(self, span: ByteSpan) -> bool:
        if self.whole:
            return span.start < self.span.stop and self.span.start < span.stop
        return span.start <= self.span.start and self.span.stop <= span.stop


class Penance:
    """Remembers which ranges of which inodes failed lately, by the module's rule. Not thread-safe."""

    def __init__(
        self, *, base: float = BASE, cap: float = CAP, memory: float = MEMORY, slots: int = SLOTS
    ) -> None:
        self._base = base
        self._cap = cap
        self._memory = memory
        self._slots = slots
        self._records: OrderedDict[tuple[int, int, int], _Record] = (
            OrderedDict()
        )  # least recently failed first

    def __len__(self) -> int:
        return len(self._records)

    def recall(self, ino: int, span: ByteSpan, now: float) -> float | None:
        """The time before which a read of `span` must not be tried, or None: try it now."""
        if not self._records:
            return None
        times = (record.until for key, record in self._records.items() if key[0] == ino and record.hits(span))
        until = max(times, default=now)
        return until if until > now else None

    def failed(
        self,
        ino: int,
        span: ByteSpan,
        errno: int,
        asked: float,
        now: float,
        *,
        waited: bool,
        whole: bool = False,
    ) -> Sentence:
        """Note that a read that was asked at `asked` has failed `now`, and say when to answer it.

        `span` is what was asked for: another read that asks for all of it shares its fate, one that asks for part of
        it may be well. With `whole` it is a chunk that cannot be had: all reads touching it share its fate. A read
        that `waited` for the end of an earlier failure's time has paid already.
        """
        self._expire(now)
        key = (ino, span.start, span.stop)
        record = self._records.pop(key, None)
        news = record is None or now >= record.until
        if record is None:
            record = _Record(span, whole, errno, 1, now + self._base)
        elif news:  # many readers that fail together are one failure
            record.failures += 1
            record.until = now + min(self._cap, self._base * 2.0 ** min(record.failures - 1, 30))
        record.errno = errno
        record.whole = record.whole or whole
        self._records[key] = record
        while len(self._records) > self._slots:
            self._records.popitem(last=False)
        until = max(asked + self._base, now if waited else record.until)
        return Sentence(errno, until, record.failures, news)

    def forgive(self, ino: int, span: ByteSpan) -> None:
        """Bytes of `span` were read: forget the failures that this disproves."""
        if not self._records:
            return
        disproved = [key for key, record in self._records.items() if key[0] == ino and record.hits(span)]
        for key in disproved:
            del self._records[key]

    def _expire(self, now: float) -> None:
        old = [key for key, record in self._records.items() if now >= record.until + self._memory]
        for key in old:
            del self._records[key]

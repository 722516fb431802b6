"""How fast bytes may come: limits by the time of day, overall and per host, and who goes on next.

Rules:

- A job pays for what it has received, and receives nothing more before it is let go on. So what comes exceeds a limit
  by what each job receives before it pays, and by `BURST_SECONDS`, never by more.
- Jobs that readers wait for go on before all others; within each kind, who has paid first.
- A host at its limit holds up nobody but its own jobs.

Pure: `now` is monotonic seconds, `minute` that of the local day.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

DAY_MINUTES = 24 * 60
# What was not used for a moment may be caught up with: timers are late, and a line that waits for one is not full.
BURST_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Timetable:
    """Bytes per second (None: no limit) from a minute of the local day on, ascending; the last holds past midnight.

    ValueError if it is empty, not ascending, outside the day, or if a rate is not positive.
    """

    steps: tuple[tuple[int, int | None], ...]

    def __post_init__(self) -> None:
        minutes = [minute for minute, _ in self.steps]
        if not minutes or minutes != sorted(set(minutes)) or not 0 <= minutes[0] <= minutes[-1] < DAY_MINUTES:
            raise ValueError(f"not ascending minutes of a day: {minutes}")
        if any(rate is not None and rate <= 0 for _, rate in self.steps):
            raise ValueError("a rate is not positive")

    def rate(self, minute: int) -> int | None:
        """Bytes per second at that minute; None: no limit."""
        at = bisect_right(self.steps, minute, key=lambda step: step[0])
        return self.steps[at - 1][1]


@dataclass(slots=True)
class _Line:
    """One limit. What was let through so far is paid for at `ready_at`."""

    timetable: Timetable
    ready_at: float = float("-inf")

    def due(self, minute: int) -> float:
        """When the next one may go on."""
        return float("-inf") if self.timetable.rate(minute) is None else self.ready_at

    def charge(self, nbytes: int, now: float, minute: int) -> None:
        rate = self.timetable.rate(minute)
        if rate is not None:
            self.ready_at = max(self.ready_at, now - BURST_SECONDS) + nbytes / rate


@dataclass(frozen=True, slots=True)
class _Payment:
    host: str
    nbytes: int
    urgent: bool


@dataclass(slots=True)
class Pacer:
    """See the module. `overall` is for all hosts together; `hosts` has those with a limit of their own."""

    overall: Timetable | None
    hosts: Mapping[str, Timetable]
    _waiting: dict[int, _Payment] = field(default_factory=dict)  # in the order in which they paid
    _lines: dict[str, _Line] = field(init=False)  # of the hosts, and under "" the overall one

    def __post_init__(self) -> None:
        self._lines = {host: _Line(timetable) for host, timetable in self.hosts.items()}
        if self.overall is not None:
            self._lines[""] = _Line(self.overall)

    @property
    def waiting(self) -> tuple[int, ...]:
        """The jobs that wait."""
        return tuple(self._waiting)

    def paces(self, host: str) -> bool:
        """Whether there may be a limit for what comes from there."""
        return "" in self._lines or host in self._lines

    def pay(self, job: int, host: str, nbytes: int, *, urgent: bool) -> None:
        """The job has received so much, and waits. `urgent`: a reader waits for it."""
        self._waiting[job] = _Payment(host, nbytes, urgent)

    def forget(self, job: int) -> None:
        """The job has ended, whether it waited or not. What it paid for has come all the same."""
        self._waiting.pop(job, None)

    def next(self, now: float, minute: int) -> tuple[list[int], float]:
        """Which jobs go on now, and when to ask again (infinity: when somebody pays)."""
        gone, due = [], float("inf")
        for job, payment in sorted(self._waiting.items(), key=lambda item: not item[1].urgent):
            lines = [line for name in ("", payment.host) if (line := self._lines.get(name)) is not None]
            ready = max((line.due(minute) for line in lines), default=now)
            if ready > now:
                due = min(due, ready)
                continue
            for line in lines:
                line.charge(payment.nbytes, now, minute)
            del self._waiting[job]
            gone.append(job)
        return gone, due

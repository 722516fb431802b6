"""Whether the cache's disk may be relied on, by its errors and by trial writes. Pure: the driver is `engine.health`.

Rules:

- One error makes the disk *unstable*: it is used as before, said to be unstable, and tried. `errors` of them within
  `window` make it *bypassed*: nothing more is put on it, and what is missing goes from the network to memory.
- Errors within `merge` seconds after one that was counted are the same trouble: a failing disk fails all its users at
  once. A failed trial is an error like any other.
- A disk is tried every `pause` while it is not healthy, and never while it is. It is healthy again when `trials` in a
  row went well and nothing failed for the `calm`.
- Who relapses is believed later: a disk that is bypassed again within `memory` after it came back has a calm twice as
  long, up to `longest_calm`. So a disk that writes well and loses what it wrote does not flap for ever.

Times are monotonic seconds; what is remembered is bounded by `errors`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Health(enum.StrEnum):
    """What may be expected of the cache's disk."""

    HEALTHY = "healthy"
    UNSTABLE = "unstable"
    BYPASSED = "bypassed"


@dataclass(frozen=True, slots=True)
class HealthRules:
    """Seconds and counts."""

    # Three errors in a minute are no accident; a retry of the kernel's own takes up to 30 s on a SATA disk.
    window: float = 60.0
    errors: int = 3
    merge: float = 1.0
    # A trial costs two syncs. Every few seconds is nothing for a sound disk, and soon for those who wait for it.
    pause: float = 5.0
    trials: int = 2
    calm: float = 10.0
    longest_calm: float = 600.0
    memory: float = 600.0


class DiskHealth:
    """Tell it of `fault` and `tried`; both say whether the state changed. `text` is the last error's, for people."""

    def __init__(self, rules: HealthRules | None = None) -> None:
        self.rules = rules or HealthRules()
        self.state = Health.HEALTHY
        self.text = ""
        self.calm = self.rules.calm
        self._faults: list[float] = []  # that counted, the oldest first; at most `errors`
        self._last = float("-inf")  # the last error, counted or not
        self._good = 0  # trials in a row
        self._returned = float("-inf")
        self._next_trial = float("inf")

    @property
    def next_trial(self) -> float:
        """When the disk is to be tried; infinity while it is healthy."""
        return self._next_trial

    def fault(self, now: float, text: str) -> bool:
        """The disk failed somebody. Whether the state changed."""
        before = self.state
        self.text, self._last, self._good = text, now, 0
        if not self._faults or now >= self._faults[-1] + self.rules.merge:
            recent = [time for time in self._faults if time > now - self.rules.window]
            self._faults = [*recent, now][-self.rules.errors :]
        if self.state is Health.HEALTHY:
            self.state, self._next_trial = Health.UNSTABLE, now + self.rules.pause
        if self.state is Health.UNSTABLE and len(self._faults) >= self.rules.errors:
            self._bypass(now)
        return self.state is not before

    def _bypass(self, now: float) -> None:
        self.state = Health.BYPASSED
        relapsed = now < self._returned + self.rules.memory
        self.calm = min(self.rules.longest_calm, 2 * self.calm) if relapsed else self.rules.calm

    def skipped(self, now: float) -> None:
        """A trial could not be made, for want of something that is not the disk's: it says nothing."""
        if self.state is not Health.HEALTHY:
            self._next_trial = now + self.rules.pause

    def tried(self, now: float, error: str = "") -> bool:
        """A trial ended: well, or with this error. Whether the state changed. Nothing happens to a healthy disk."""
        if self.state is Health.HEALTHY:
            return False
        self._next_trial = now + self.rules.pause
        if error:
            return self.fault(now, error)
        self._good += 1
        if self._good < self.rules.trials or now < self._last + self.calm:
            return False
        if self.state is Health.BYPASSED:
            self._returned = now
        self.state, self.text = Health.HEALTHY, ""
        self._faults, self._next_trial = [], float("inf")
        return True

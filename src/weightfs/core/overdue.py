"""When a kernel request is overdue, and whether it is then answered: the rules of the mount's watchdog.

Each layer bounds its own waits; these bounds lie beyond them, for the day when a fault of ours, or a disk that never
answers, breaks such a promise. Seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MARGIN: Final = 30.0  # beyond a layer's own bound: a busy loop answers late, but by itself
# A read that may wait for ever is told of, once. Nobody can say that it hangs: its origin may be away.
FOREVER: Final = 3600.0
# Metadata comes from memory. What it may wait for is a tree of names that is made anew: 10 s for 100,000 files. After
# 120 s the kernel itself complains of a task that hangs (hung_task_timeout_secs).
METADATA: Final = 120.0


@dataclass(frozen=True, slots=True)
class Bound:
    """A request that waits for longer than `seconds` is told of and, if `answered`, gets an error."""

    seconds: float
    answered: bool = True


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one mount: of a read's wait for the engine, of a lookup, and of every other request."""

    read: Bound
    lookup: Bound
    other: Bound = Bound(METADATA)

    @classmethod
    def of(cls, *, read_timeout: float, browse_timeout: float = 0.0) -> Bounds:
        """Those beyond `read_timeout` (0: a read may wait for ever), and the time that a lookup may ask an origin."""
        read = Bound(read_timeout + MARGIN) if read_timeout > 0 else Bound(FOREVER, answered=False)
        return cls(read, Bound(max(METADATA, browse_timeout + MARGIN)))

    def of_request(self, op: str) -> Bound:
        """The bound of a request by its name in the protocol."""
        match op:
            case "read":
                return self.read
            case "lookup":
                return self.lookup
            case _:
                return self.other

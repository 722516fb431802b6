"""What the engine counts for whoever watches it by machine.

Rules: bounded by construction, whatever is pinned and whoever gives it: a histogram has the buckets written here, a
host beyond the first `MAX_HOSTS` counts as `OTHER`, a failure's kind is one of an enum, and nothing is kept by ref or
by blob. A counter never goes back while the process lives. Owned by the trio thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import trio

from weightfs.errors import FailureKind

# More than the mirrors of any one site that was met: the rest is still counted, together.
MAX_HOSTS: Final = 32
OTHER: Final = "other"
LOCAL: Final = "file"  # of file URLs, which have no host
# Seconds. From a chunk that was just landing up to the default `read-timeout`.
WAIT_BUCKETS: Final = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
# Seconds. One request is sized to last about one (`core.plan`), and its origin may be silent for 30.
FETCH_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class HistogramMeasures:
    """`counts[i]`: values of at most `bounds[i]` and more than the bound before it; the last one: of more than all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Seconds, by bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    @contextmanager
    def timing(self) -> Iterator[None]:
        """The time that the block takes, however it ends."""
        began = trio.current_time()
        try:
            yield
        finally:
            self.observe(trio.current_time() - began)

    def frozen(self) -> HistogramMeasures:
        """As it is now."""
        return HistogramMeasures(self._bounds, tuple(self._counts), self._total)


@dataclass(slots=True)
class HostTally:
    """What one host, with all of its files, has given since the process began."""

    nbytes: int = 0
    failures: int = 0
    mismatches: int = 0


@dataclass(slots=True)
class Tally:
    """Everything that is counted. One per engine, shared by its parts."""

    read_waits: Histogram = field(default_factory=lambda: Histogram(WAIT_BUCKETS))
    read_failures: Counter[FailureKind] = field(default_factory=Counter)
    chunk_waits: Histogram = field(default_factory=lambda: Histogram(WAIT_BUCKETS))
    fetches: Histogram = field(default_factory=lambda: Histogram(FETCH_BUCKETS))
    fetch_failures: Counter[FailureKind] = field(default_factory=Counter)
    hosts: dict[str, HostTally] = field(default_factory=dict)

    def host(self, url: str) -> HostTally:
        """Where the fetches from `url` are counted."""
        name = _host_of(url)
        if name not in self.hosts and len(self.hosts) >= MAX_HOSTS:
            name = OTHER
        return self.hosts.setdefault(name, HostTally())


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or LOCAL, parts.port
    except ValueError:  # a URL from somebody's list; the fetch of it says what is wrong
        return OTHER
    return host if port is None else f"{host}:{port}"

"""What a mount counts. Read at any time from the same trio run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from weightfs.core.geometry import ByteSpan
from weightfs.mount.requests import Requests


@dataclass(frozen=True, slots=True)
class InFlight:
    """A read that has not been answered: `span` of its blob, `age` in seconds."""

    ino: int
    span: ByteSpan
    age: float


@dataclass(slots=True)
class MountStats:
    """Counters of one mount since its start; read at any time from the same trio run."""

    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0  # answered with an errno
    delayed_reads: int = 0  # tried only after the time of an earlier failure
    held: int = 0  # of both: waiting right now
    internal_errors: int = 0  # handlers that met an error nobody foresaw
    passed_opens: int = 0  # handles whose reads never come here
    passed_files: int = 0  # inodes that have such handles right now
    requests: Requests = field(default_factory=Requests)  # of every kind, in flight

    def in_flight(self, now: float) -> Iterator[InFlight]:
        """Yield the reads that are not answered yet, oldest first; `now` is trio's current time."""
        for request in self.requests:
            if request.span is not None:
                yield InFlight(request.inode, request.span, now - request.since)

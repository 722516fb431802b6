"""What a mount counts. Read at any time from the same trio run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from weightfs.core.geometry import ByteSpan


@dataclass(frozen=True, slots=True)
class InFlight:
    """A read that has not been answered: `age` in seconds."""

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
    _waiting: dict[int, tuple[int, ByteSpan, float]] = field(default_factory=dict)
    _serial: Iterator[int] = field(default_factory=itertools.count)

    def began(self, ino: int, span: ByteSpan, now: float) -> int:
        """A read was asked; its number for `ended`."""
        number = next(self._serial)
        self._waiting[number] = (ino, span, now)
        return number

    def ended(self, number: int) -> None:
        """It is answered."""
        del self._waiting[number]

    def in_flight(self, now: float) -> Iterator[InFlight]:
        """Yield the reads that are not answered yet, oldest first; `now` is trio's current time."""
        for ino, span, since in self._waiting.values():
            yield InFlight(ino, span, now - since)

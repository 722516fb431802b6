"""When a blob was last used: in seconds since 1970, for each of at most 64 regions of it.

Rule: coarse, so that it costs nothing to keep. A read writes a few numbers in memory; all that is stored of a blob fits
into 300 bytes. Where nothing is known, a region counts as used when the blob landed.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightfs.core.chunkset import ChunkSet
from weightfs.core.eviction import Run
from weightfs.core.geometry import BlobShape, ChunkSpan

MAX_REGIONS = 64  # of a 40 GiB blob, one is 640 MiB; below 64 MiB, one is a chunk


class Uses:
    """The regions of one blob. Clocks are arguments, and may jump: the last word counts, not the largest."""

    __slots__ = ("changed", "length", "times")

    def __init__(self, shape: BlobShape, times: Sequence[int] = (), *, landed: int = 0) -> None:
        """`times`: as they were stored; ignored if they are of another shape. `landed`: where nothing is known."""
        self.length = max(1, -(-shape.chunk_count // MAX_REGIONS))  # chunks in a region
        count = -(-shape.chunk_count // self.length)
        self.times = list(times) if len(times) == count else [landed] * count
        self.changed = False

    @property
    def last(self) -> int:
        """When any of it was last used; 0 for an empty blob."""
        return max(self.times, default=0)

    def touch(self, chunks: ChunkSpan, now: float) -> None:
        """These chunks are used, or have landed."""
        second = int(now)
        for region in range(
            chunks.start // self.length, -(-chunks.stop // self.length) if len(chunks) else 0
        ):
            if self.times[region] != second:
                self.times[region] = second
                self.changed = True

    def runs(self, present: ChunkSet, shape: BlobShape) -> tuple[Run, ...]:
        """What is present, cut where regions end, each run with its last use."""
        found = []
        for region, time in enumerate(self.times):
            start = region * self.length
            span = ChunkSpan(start, min(start + self.length, shape.chunk_count))
            found += [Run(run, len(shape.bytes_of(run)), time) for run in present.runs(span)]
        return tuple(found)

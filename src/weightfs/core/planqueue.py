"""Two queues in which an event costs O(log n), however many blobs there are: a line by rank, and timers.

Rule: entries that no longer hold are left in the heap and passed over when they come up; a line is rebuilt before more
than half of it is such.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Line(Generic[T]):
    """Items in line, the lowest rank first; each at most once."""

    def __init__(self) -> None:
        self._ranks: dict[T, int] = {}
        self._heap: list[tuple[int, int, T]] = []
        self._entry = count()  # no two entries are equal, so that items are never compared

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, item: T) -> bool:
        return item in self._ranks

    def put(self, item: T, rank: int) -> None:
        """Place the item, or move it."""
        if self._ranks.get(item) == rank:
            return
        self._ranks[item] = rank
        if len(self._heap) > 2 * len(self._ranks) + 16:
            self._heap = [(rank, next(self._entry), item) for item, rank in self._ranks.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (rank, next(self._entry), item))

    def leave(self, item: T) -> None:
        """Take the item out of the line, if it is in it."""
        self._ranks.pop(item, None)
        if self._heap and self._heap[0][2] is item:
            heapq.heappop(self._heap)

    def first(self) -> T | None:
        """The item with the lowest rank; it stays in line."""
        while self._heap:
            rank, _, item = self._heap[0]
            if self._ranks.get(item) == rank:
                return item
            heapq.heappop(self._heap)
        return None


class Timers(Generic[T]):
    """What is to be looked at when a time has come. `note` says what of the item."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T, int]] = []
        self._entry = count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: float, item: T, note: int = -1) -> None:
        """Look at `item` at `time`."""
        heapq.heappush(self._heap, (time, next(self._entry), item, note))

    def due(self, now: float) -> Iterator[tuple[T, int]]:
        """Items and notes whose time has come; they are forgotten."""
        while self._heap and self._heap[0][0] <= now:
            _, _, item, note = heapq.heappop(self._heap)
            yield item, note

    def next(self) -> float:
        """When the next one is due; infinity if there is none."""
        return self._heap[0][0] if self._heap else float("inf")

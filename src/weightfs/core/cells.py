"""Runs of chunks, scaled to the cells of a line in a terminal. Pure.

Rules: a cell is PRESENT only if every chunk of it is, and ABSENT only if none is; what is in flight or quarantined is
seen however little of a cell it is. No line has more cells than there are chunks: a cell is never less than one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Runs: TypeAlias = Iterable[Sequence[int]]  # pairs (start, stop), half-open, ascending, disjoint


class Cell(enum.Enum):
    """What a cell shows: the first of these that is true of a chunk in it, with PRESENT only if all are."""

    QUARANTINED = "quarantined"
    IN_FLIGHT = "in flight"
    PRESENT = "present"
    PART = "part"
    ABSENT = "absent"


def cells(count: int, width: int, *, present: Runs, in_flight: Runs, quarantined: Runs) -> list[Cell]:
    """`count` chunks in at most `width` cells; runs are within [0, count).

    Cell `i` of `n` begins at chunk `i·count // n`. ValueError if there is no room for a cell.
    """
    if width < 1:
        raise ValueError(f"a line has at least one cell, not {width}")
    n = min(width, count)
    here = _covered(count, n, present)
    flying = _covered(count, n, in_flight)
    bad = _covered(count, n, quarantined)
    found = []
    for i in range(n):
        size = _begin(i + 1, count, n) - _begin(i, count, n)
        if bad[i]:
            found.append(Cell.QUARANTINED)
        elif flying[i]:
            found.append(Cell.IN_FLIGHT)
        elif here[i] == size:
            found.append(Cell.PRESENT)
        else:
            found.append(Cell.PART if here[i] else Cell.ABSENT)
    return found


def cell_of(chunk: int, count: int, n: int) -> int:
    """The cell, of `n`, that has a chunk of `count`."""
    return ((chunk + 1) * n - 1) // count


def _begin(cell: int, count: int, n: int) -> int:
    return cell * count // n


def _covered(count: int, n: int, runs: Runs) -> list[int]:
    """How many chunks of each cell the runs have."""
    covered = [0] * n
    for start, stop in runs:
        if start >= stop:
            continue
        for cell in range(cell_of(start, count, n), cell_of(stop - 1, count, n) + 1):
            covered[cell] += min(stop, _begin(cell + 1, count, n)) - max(start, _begin(cell, count, n))
    return covered

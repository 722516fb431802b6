"""Cells against the definition, chunk by chunk."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.cells import Cell, cell_of, cells

COUNTS = st.integers(1, 200)


def chunks_of(runs: list[tuple[int, int]]) -> set[int]:
    return {chunk for start, stop in runs for chunk in range(start, stop)}


@st.composite
def some_runs(draw: st.DrawFn, count: int) -> list[tuple[int, int]]:
    ends = sorted(draw(st.sets(st.integers(0, count), max_size=12)))
    return [run for index, run in enumerate(pairwise(ends)) if index % 2 == 0]


@given(st.data(), COUNTS, st.integers(1, 90))
def test_a_cell_shows_what_is_true_of_its_chunks(data: st.DataObject, count: int, width: int) -> None:
    present, flying, bad = (data.draw(some_runs(count)) for _ in range(3))
    shown = cells(count, width, present=present, in_flight=flying, quarantined=bad)
    n = len(shown)
    assert n == min(width, count)
    groups: list[set[int]] = [set() for _ in shown]
    for chunk in range(count):
        groups[cell_of(chunk, count, n)].add(chunk)
    assert all(groups)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for cell, group in zip(shown, groups, strict=True):
        here = group & chunks_of(present)
        if group & chunks_of(bad):
            assert cell is Cell.QUARANTINED
        elif group & chunks_of(flying):
            assert cell is Cell.IN_FLIGHT
        elif here == group:
            assert cell is Cell.PRESENT
        else:
            assert cell is (Cell.PART if here else Cell.ABSENT)


def test_an_empty_file_has_no_cell_and_an_empty_run_shows_nothing() -> None:
    assert cells(0, 10, present=[], in_flight=[], quarantined=[]) == []
    assert cells(2, 10, present=[(1, 1)], in_flight=[], quarantined=[]) == [Cell.ABSENT, Cell.ABSENT]


def test_there_is_no_line_without_a_cell() -> None:
    with pytest.raises(ValueError, match="at least one"):
        cells(1, 0, present=[], in_flight=[], quarantined=[])

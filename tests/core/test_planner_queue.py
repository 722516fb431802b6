"""The planner's queues: lines by rank against a sorted dictionary, and timers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.planqueue import Line, Timers

STEPS = st.lists(st.tuples(st.sampled_from(["put", "leave", "first"]), st.integers(0, 5), st.integers(-3, 3)))


@given(STEPS)
def test_a_line_is_a_dictionary_sorted_by_rank(steps: list[tuple[str, int, int]]) -> None:
    line: Line[int] = Line()
    reference: dict[int, int] = {}
    for what, item, rank in steps:
        if what == "put":
            line.put(item, rank)
            reference[item] = rank
        elif what == "leave":
            line.leave(item)
            reference.pop(item, None)
        first = line.first()
        assert len(line) == len(reference)
        assert (item in line) is (item in reference)
        if first is None:
            assert not reference
        else:
            assert reference[first] == min(reference.values())


def test_a_line_does_not_grow_with_what_is_moved_in_it() -> None:
    line: Line[str] = Line()
    line.put("first", -1)
    for rank in range(10_000):
        line.put("moved", rank)
    assert len(line._heap) < 40
    line.leave("first")
    assert line.first() == "moved"


def test_timers_come_in_order_and_once() -> None:
    timers: Timers[str] = Timers()
    assert timers.next() == float("inf")
    timers.add(2.0, "b", 7)
    timers.add(1.0, "a")
    timers.add(2.0, "a")
    assert timers.next() == 1.0
    assert list(timers.due(0.5)) == []
    assert list(timers.due(2.0)) == [("a", -1), ("b", 7), ("a", -1)]
    assert len(timers) == 0

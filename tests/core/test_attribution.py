from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.attribution import MAX_REMEMBERED, Attribution, Cause, FaultCounts


def test_wrong_bytes_that_come_once_are_the_wires_fault() -> None:
    faults = Attribution()
    assert not faults.counts
    assert faults.mismatched(0, 3, b"x") is Cause.WIRE
    assert faults.mismatched(0, 3, b"y") is Cause.WIRE
    assert faults.mismatched(1, 4, b"x") is Cause.WIRE
    assert faults.of_mirror(0) == FaultCounts(wire=2)
    assert faults.counts == FaultCounts(wire=3)
    assert str(faults.counts) == "wire=3 disk=0 origin=0"


def test_the_same_wrong_bytes_again_are_the_origins_fault_also_the_first_time() -> None:
    faults = Attribution()
    faults.mismatched(0, 3, b"x")
    assert faults.mismatched(1, 3, b"x") is Cause.ORIGIN
    assert (faults.of_mirror(0), faults.of_mirror(1)) == (FaultCounts(origin=1), FaultCounts(origin=1))
    assert faults.mismatched(1, 3, b"x") is Cause.ORIGIN
    assert faults.counts == FaultCounts(origin=3)


def test_the_disk_and_the_whole() -> None:
    faults = Attribution()
    faults.lost(2)
    faults.refuted()
    faults.refuted(1)
    assert faults.counts == FaultCounts(disk=2, origin=2)
    assert faults.of_mirror(1) == FaultCounts(origin=1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from([b"x", b"y"]))))
def test_every_wrong_chunk_counts_once(found: list[tuple[int, int, bytes]]) -> None:
    faults = Attribution()
    for wrong in found:
        faults.mismatched(*wrong)
    keys = [(chunk, digest) for _, chunk, digest in found]
    once = sum(1 for key in keys if keys.count(key) == 1)
    assert faults.counts == FaultCounts(wire=once, origin=len(found) - once)


def test_what_is_remembered_is_bounded_and_what_is_counted_is_not() -> None:
    faults = Attribution()
    for chunk in range(MAX_REMEMBERED + 1):
        faults.mismatched(0, chunk, b"x")
    assert faults.mismatched(0, 0, b"x") is Cause.WIRE  # forgotten
    assert faults.mismatched(0, MAX_REMEMBERED, b"x") is Cause.ORIGIN
    assert faults.counts == FaultCounts(wire=MAX_REMEMBERED + 1, origin=2)

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MAX_CHUNKS, BlobShape, ChunkSpan

COUNT = 37  # not a multiple of eight


@st.composite
def counted(draw: st.DrawFn) -> tuple[int, set[int]]:
    count = draw(st.integers(0, 70))
    return count, draw(st.sets(st.integers(0, count - 1))) if count else set()


@st.composite
def spans(draw: st.DrawFn, count: int = COUNT) -> ChunkSpan:
    start = draw(st.integers(0, count))
    return ChunkSpan(start, draw(st.integers(start, count)))


def naive_runs(span: ChunkSpan, chunks: set[int], *, present: bool) -> list[ChunkSpan]:
    """One chunk at a time: what the memchr walk must equal."""
    groups = groupby(span, key=lambda chunk: (chunk in chunks) is present)
    runs = [list(group) for wanted, group in groups if wanted]
    return [ChunkSpan(run[0], run[-1] + 1) for run in runs]


@given(counted())
def test_reads_like_a_python_set(case: tuple[int, set[int]]) -> None:
    count, chunks = case
    made = ChunkSet(count, chunks)
    assert list(made) == sorted(chunks)
    assert len(made) == len(chunks)
    assert made.full == (len(chunks) == count)
    assert {chunk for chunk in range(-2, count + 2) if chunk in made} == chunks
    assert "3" not in made


@given(st.sets(st.integers(0, COUNT - 1)), spans())
def test_runs_holes_and_covers_against_the_naive_walk(chunks: set[int], span: ChunkSpan) -> None:
    made = ChunkSet(COUNT, chunks)
    assert list(made.runs(span)) == naive_runs(span, chunks, present=True)
    assert list(made.holes(span)) == naive_runs(span, chunks, present=False)
    assert made.covers(span) == chunks.issuperset(span)
    assert list(made.runs()) == naive_runs(ChunkSpan(0, COUNT), chunks, present=True)


@given(st.sets(st.integers(0, COUNT - 1)), st.integers(0, COUNT))
def test_first_hole(chunks: set[int], start: int) -> None:
    assert ChunkSet(COUNT, chunks).first_hole(start) == min(set(range(start, COUNT)) - chunks, default=None)


@given(counted())
def test_bitmap_round_trip_and_layout(case: tuple[int, set[int]]) -> None:
    count, chunks = case
    data = ChunkSet(count, chunks).to_bytes()
    assert len(data) == -(-count // 8)
    assert {chunk for chunk in range(len(data) * 8) if data[chunk // 8] >> chunk % 8 & 1} == chunks
    again = ChunkSet.from_bytes(count, data)
    assert again == ChunkSet(count, chunks)
    assert len(again) == len(chunks)


@pytest.mark.parametrize(
    ("count", "data"),
    [(0, b"\0"), (8, b""), (8, b"\0\0"), (9, b"\0"), (9, b"\0\2"), (7, b"\x80"), (1, b"\2")],
)
def test_bitmaps_of_another_blob_are_refused(count: int, data: bytes) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        ChunkSet.from_bytes(count, data)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        ChunkSet(-1)


@pytest.mark.parametrize("chunk", [-1, COUNT, COUNT + 5])
def test_chunks_outside_raise_and_change_nothing(chunk: int) -> None:
    # -1 would silently be the last chunk of a bytearray
    made = ChunkSet(COUNT, [COUNT - 1])
    for change in (made.add, made.discard):
        with pytest.raises(IndexError, match=f"chunk {chunk} of {COUNT}"):
            change(chunk)
    assert list(made) == [COUNT - 1]


def test_spans_outside_raise_at_once() -> None:
    made = ChunkSet(COUNT)
    outside = ChunkSpan(COUNT - 1, COUNT + 1)
    for ask in (made.covers, made.holes, made.runs, made.add_span, made.discard_span):
        with pytest.raises(IndexError, match=f"of {COUNT}"):
            ask(outside)
    with pytest.raises(IndexError):
        made.first_hole(COUNT + 1)


@given(st.integers(0, 300), st.data())
def test_byte_count_is_the_sum_over_chunks(size: int, data: st.DataObject) -> None:
    shape = BlobShape(size, 16)
    chunks = {chunk for chunk in shape.chunks if data.draw(st.booleans())}
    expected = sum(len(shape.span_of(chunk)) for chunk in chunks)
    assert ChunkSet(shape.chunk_count, chunks).byte_count(shape) == expected


def test_byte_count_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        ChunkSet(3).byte_count(BlobShape(32, 16))


def test_union_and_difference_refuse_another_count() -> None:
    for change in (ChunkSet(3).union, ChunkSet(3).difference):
        with pytest.raises(ValueError, match="different blobs"):
            change(ChunkSet(4))


def test_equality_is_of_count_and_chunks() -> None:
    assert ChunkSet(3, [1]) == ChunkSet(3, [1])
    assert ChunkSet(3, [1]) != ChunkSet(4, [1])
    assert ChunkSet(3, [1]) != {1}
    with pytest.raises(TypeError, match="unhashable"):
        hash(ChunkSet(3))


def test_a_copy_is_independent() -> None:
    first = ChunkSet(5, [1])
    second = first.copy()
    second.add(2)
    first.discard(1)
    assert (list(first), list(second), second.count, len(second)) == ([], [1, 2], 5, 2)


def test_holes_may_be_filled_while_they_are_walked() -> None:
    # The planner marks what it has planned while it asks for the next hole.
    made = ChunkSet(COUNT, [3, 9])
    for hole in made.holes(ChunkSpan(0, COUNT)):
        made.add_span(hole)
    assert made.full
    assert len(made) == COUNT


def test_repr_stays_short() -> None:
    assert repr(ChunkSet(10, [1, 2, 5])) == "<ChunkSet 3 of 10: [1..3 5..6]>"
    assert len(repr(ChunkSet(MAX_CHUNKS, range(0, MAX_CHUNKS, 2)))) < 150


def test_the_biggest_blob() -> None:
    made = ChunkSet(MAX_CHUNKS, range(0, MAX_CHUNKS, 2))
    assert len(made.to_bytes()) == 4096
    assert ChunkSet.from_bytes(MAX_CHUNKS, made.to_bytes()) == made
    assert len(list(made.holes(ChunkSpan(0, MAX_CHUNKS)))) == MAX_CHUNKS // 2


class AgainstASet(RuleBasedStateMachine):
    """Every mutation, in any order, against a Python set."""

    def __init__(self) -> None:
        super().__init__()
        self.real = ChunkSet(COUNT)
        self.model: set[int] = set()

    @rule(chunk=st.integers(0, COUNT - 1))
    def add(self, chunk: int) -> None:
        self.real.add(chunk)
        self.model.add(chunk)

    @rule(chunk=st.integers(0, COUNT - 1))
    def discard(self, chunk: int) -> None:
        self.real.discard(chunk)
        self.model.discard(chunk)

    @rule(span=spans())
    def add_span(self, span: ChunkSpan) -> None:
        self.real.add_span(span)
        self.model.update(span)

    @rule(span=spans())
    def discard_span(self, span: ChunkSpan) -> None:
        self.real.discard_span(span)
        self.model.difference_update(span)

    @rule(other=st.sets(st.integers(0, COUNT - 1)))
    def union(self, other: set[int]) -> None:
        self.real.union(ChunkSet(COUNT, other))
        self.model |= other

    @rule(other=st.sets(st.integers(0, COUNT - 1)))
    def difference(self, other: set[int]) -> None:
        self.real.difference(ChunkSet(COUNT, other))
        self.model -= other

    @rule()
    def clear(self) -> None:
        self.real.clear()
        self.model.clear()

    @rule()
    def swap_for_a_stored_one(self) -> None:
        self.real = ChunkSet.from_bytes(COUNT, self.real.to_bytes())

    @invariant()
    def agree(self) -> None:
        assert list(self.real) == sorted(self.model)
        assert len(self.real) == len(self.model)


TestAgainstASet = AgainstASet.TestCase
TestAgainstASet.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)

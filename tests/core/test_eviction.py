"""What is evicted: the oldest first, never what is exempt, never more than is wanted and one unit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.chunkset import ChunkSet
from weightfs.core.eviction import Candidate, Eviction, EvictionPlan, Run, plan_evictions
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.core.uses import MAX_REGIONS, Uses

NOW = 1_000_000.0


def blob(number: int) -> BlobId:
    return BlobId(bytes([number]) * 16)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, ...]:
    found, at = [], 0
    for _ in range(draw(st.integers(1, 5))):
        start = at + draw(st.integers(0, 2))
        at = start + draw(st.integers(1, 3))
        found.append(Run(ChunkSpan(start, at), (at - start) * 10, draw(USED)))
    return tuple(found)


USED = st.floats(NOW - 1000, NOW + 1000, allow_nan=False)


@st.composite
def candidate(draw: st.DrawFn, number: int) -> Candidate:
    parts = draw(st.just(()) | runs())
    size = sum(run.nbytes for run in parts) if parts else draw(st.integers(0, 100))
    used = max((run.used for run in parts), default=draw(USED))
    return Candidate(blob(number), size, used, draw(st.booleans()), draw(st.booleans()), parts)


CANDIDATES = st.integers(0, 6).flatmap(
    lambda count: st.tuples(*(candidate(number) for number in range(count)))
)
AGES = st.none() | st.floats(0, 2000)


def units(plan: EvictionPlan, candidates: tuple[Candidate, ...]) -> list[int]:
    """The bytes of each unit that goes for the sake of room; of the plan's last blob in order of their going."""
    by_id = {one.blob: one for one in candidates}
    sizes: list[int] = []
    for eviction in plan.evictions:
        one = by_id[eviction.blob]
        if eviction.aged or not one.runs:
            sizes.append(eviction.nbytes)
            continue
        taken = [run for run in one.runs if any(run.chunks.start in span for span in eviction.chunks or ())]
        taken.sort(key=lambda run: (min(run.used, NOW), -run.chunks.start))
        sizes += [run.nbytes for run in taken]
    return sizes


@given(CANDIDATES, st.integers(-5, 400), AGES, st.randoms(use_true_random=False))
def test_the_rules(
    candidates: tuple[Candidate, ...], wanted: int, max_age: float | None, shuffle: random.Random
) -> None:
    plan = plan_evictions(candidates, wanted=wanted, now=NOW, max_age=max_age)
    by_id = {one.blob: one for one in candidates}
    going = [by_id[eviction.blob] for eviction in plan.evictions]
    assert not any(one.exempt for one in going)
    assert len(set(going)) == len(going)
    ages = [min(one.used, NOW) for one in going]
    assert ages == sorted(ages)
    # Nothing older stays while something younger goes.
    free = [one for one in candidates if not one.exempt and one.nbytes]
    staying = [min(one.used, NOW) for one in free if one not in going]
    assert not staying or not ages or max(ages) <= min(staying)
    # All that is too old goes, and whole.
    aged = {one.blob for one in free if max_age is not None and NOW - one.used > max_age}
    assert {eviction.blob for eviction in plan.evictions if eviction.aged} == aged
    assert all(eviction.chunks is None for eviction in plan.evictions if eviction.aged)
    # What is wanted is had, or everything goes; and the last unit was needed.
    assert plan.missing == max(0, wanted - plan.nbytes)
    if plan.missing:
        assert plan.nbytes == sum(one.nbytes for one in free)
    sizes = units(plan, candidates)
    assert sum(sizes) == plan.nbytes
    if plan.evictions and not plan.evictions[-1].aged:
        assert sum(sizes[:-1]) < wanted
    elif plan.evictions:
        assert all(eviction.aged for eviction in plan.evictions)
    again = list(candidates)
    shuffle.shuffle(again)
    assert plan_evictions(again, wanted=wanted, now=NOW, max_age=max_age) == plan


@given(CANDIDATES, st.integers(0, 400))
def test_a_part_is_the_oldest_part(candidates: tuple[Candidate, ...], wanted: int) -> None:
    for eviction in plan_evictions(candidates, wanted=wanted, now=NOW).evictions:
        one = next(one for one in candidates if one.blob == eviction.blob)
        if eviction.chunks is None:
            assert eviction.nbytes == one.nbytes
            continue
        taken = {chunk for span in eviction.chunks for chunk in span}
        assert list(eviction.chunks) == sorted(eviction.chunks)
        assert all(a.stop < b.start for a, b in zip(eviction.chunks, eviction.chunks[1:], strict=False))
        gone = [run for run in one.runs if run.chunks.start in taken]
        left = [run for run in one.runs if run.chunks.start not in taken]
        assert {chunk for run in gone for chunk in run.chunks} == taken
        assert sum(run.nbytes for run in gone) == eviction.nbytes
        rank = lambda run: (min(run.used, NOW), -run.chunks.start)  # noqa: E731 - one sorting key, twice
        assert not left or max(map(rank, gone)) < min(map(rank, left))


def test_an_example() -> None:
    old = Candidate(blob(1), 40, NOW - 100)
    parts = (
        Run(ChunkSpan(0, 2), 20, NOW - 5),
        Run(ChunkSpan(2, 4), 20, NOW - 50),
        Run(ChunkSpan(4, 6), 20, NOW - 50),
    )
    young = Candidate(blob(2), 60, NOW - 5, runs=parts)
    pinned = Candidate(blob(3), 500, 0.0, pinned=True)
    opened = Candidate(blob(4), 500, 0.0, in_use=True)
    plan = plan_evictions([opened, young, pinned, old], wanted=55, now=NOW)
    assert plan.evictions == (
        Eviction(blob(1), None, 40, 100.0),
        Eviction(blob(2), (ChunkSpan(4, 6),), 20, 5.0),
    )
    assert plan.missing == 0
    assert plan_evictions([opened, young, pinned, old], wanted=101, now=NOW).missing == 1


def test_a_clock_that_jumped_back_does_no_harm() -> None:
    """What was used "tomorrow" is neither too old nor kept for ever: it is as a use of now."""
    future, past = Candidate(blob(1), 10, NOW + 9e9), Candidate(blob(2), 10, NOW)
    assert plan_evictions([future], wanted=0, now=NOW, max_age=0.0).evictions == ()
    parts = tuple(Run(ChunkSpan(at, at + 1), 10, NOW + 5 + at) for at in range(3))
    (eviction,) = plan_evictions([Candidate(blob(1), 30, NOW + 9, runs=parts)], wanted=10, now=NOW).evictions
    assert eviction.chunks == (ChunkSpan(2, 3),)
    assert [one.blob for one in plan_evictions([past, future], wanted=20, now=NOW).evictions] == [
        blob(1),
        blob(2),
    ]


# ---- last use


@given(st.integers(0, 300), st.lists(st.tuples(st.integers(0, 299), st.integers(1, 40), st.integers(1, 99))))
def test_uses_know_the_last_use_of_every_region(count: int, touches: list[tuple[int, int, int]]) -> None:
    shape = BlobShape(count * 4096, 4096)
    uses = Uses(shape, landed=5)
    model = dict.fromkeys((chunk // uses.length for chunk in range(count)), 5)
    assert len(model) == len(uses.times) <= MAX_REGIONS
    for start, length, time in touches:
        span = ChunkSpan(start, start + length).intersect(shape.chunks)
        uses.touch(span, time + 0.5)
        model.update(dict.fromkeys((chunk // uses.length for chunk in span), time))
    assert uses.times == list(model.values())
    assert uses.changed or not any(start < count and time != 5 for start, _, time in touches)
    parts = uses.runs(ChunkSet(count, range(count)), shape)
    assert [chunk for run in parts for chunk in run.chunks] == list(range(count))
    assert sum(run.nbytes for run in parts) == shape.size
    assert [run.used for run in parts] == uses.times


def test_uses_are_taken_up_again_if_they_fit() -> None:
    shape = BlobShape(3 * 4096, 4096)
    assert Uses(shape, (7, 9, 8)).times == [7, 9, 8]
    assert Uses(shape, (7, 9, 8)).last == 9
    assert Uses(shape, (7, 9), landed=4).times == [4, 4, 4]
    assert Uses(BlobShape(0, 4096)).last == 0
    again = Uses(shape, (7, 9, 8))
    again.touch(ChunkSpan(1, 2), 9.9)
    assert not again.changed  # within the same second: nothing to be stored
    again.touch(ChunkSpan(1, 2), 3.0)  # the clock was set back: the last word counts
    assert again.times == [7, 3, 8]
    assert again.changed


@pytest.mark.parametrize("count", [64, 65, 128, 129, 32_768])
def test_regions_cover_every_chunk(count: int) -> None:
    shape = BlobShape(count * 4096, 4096)
    uses = Uses(shape)
    assert len(uses.times) <= MAX_REGIONS
    uses.touch(ChunkSpan(count - 1, count), 5)
    assert uses.times[-1] == 5
    assert sum(1 for time in uses.times if time) == 1

"""The planner's word on a chunk, by example: each reason for which a reader may wait."""

from __future__ import annotations

from weightfs.core.geometry import MIB, BlobShape, ChunkSpan
from weightfs.core.plan import Limits
from weightfs.core.planword import ChunkState, ChunkWord
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

A = blob_id(1)


def driver(*names: str, **limits: int) -> PlanDriver:
    made = PlanDriver(Limits(**limits))
    made.add(A, BlobShape(16 * MIB, MIB), mirrors(*(names or ("one",))))
    return made


def word(made: PlanDriver, chunk: int) -> ChunkWord:
    (one,) = made.planner.words(A, ChunkSpan(chunk, chunk + 1), made.now)
    assert one.chunk == chunk
    return one


def test_what_nobody_asked_for_what_is_fetched_and_what_is_there() -> None:
    made = driver()
    assert word(made, 3) == ChunkWord(3, ChunkState.UNASKED)
    made.need(A, 3, 4)
    made.sleep(7)
    (job,) = made.jobs
    assert word(made, 3) == ChunkWord(3, ChunkState.FETCHING, 1, job, "http://one/x", 7.0)
    made.land(job)
    assert word(made, 3) == ChunkWord(3, ChunkState.PRESENT)
    assert [one.state for one in made.planner.words(A, ChunkSpan(3, 5), made.now)] == [
        ChunkState.PRESENT,
        ChunkState.UNASKED,
    ]


def test_behind_others_and_behind_a_drop() -> None:
    made = driver(max_jobs=1, background_jobs=1)
    made.need(A, 0, 1)
    made.need(A, 9, 10)
    made.need(A, 9, 11)
    assert word(made, 9) == ChunkWord(9, ChunkState.QUEUED, 2, why="1 of 1 jobs run")
    made.land(1)
    made.drop(A, [0])
    made.need(A, 0, 1)
    assert word(made, 0) == ChunkWord(0, ChunkState.DROPPING, 1)


def test_a_pause_after_a_round_of_failures() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.fail(1, FailureKind.CONNECT, jitter=0.5)
    one = word(made, 0)
    assert (one.state, one.waiters, one.why) == (ChunkState.PAUSED, 1, "it is connect")
    assert one.rest is not None
    assert one.rest > 0
    made.sleep(one.rest)
    assert word(made, 0).state is ChunkState.FETCHING
    (job,) = made.jobs
    made.land(job)  # the trouble is over: a later pause has another reason
    made.need(A, 5, 6)
    made.done(job)
    made.done(max(made.jobs))
    assert (word(made, 5).state, word(made, 5).why) == (ChunkState.PAUSED, "")


def test_a_pause_before_any_round_has_ended() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.done(1)  # it said that it was done, and was not
    one = word(made, 0)
    assert (one.state, one.why) == (ChunkState.PAUSED, "")


def test_a_chunk_and_a_blob_that_are_given_up() -> None:
    made = driver()
    made.need(A, 0, 1)
    while made.waiting:
        job = max(made.jobs)
        made.mismatch(job)
        if made.jobs:
            made.done(min(made.jobs))
    held = word(made, 0)
    assert (held.state, held.why) == (ChunkState.GIVEN_UP, "wrong bytes")
    assert held.rest == made.limits.hold_base
    assert word(made, 5).state is ChunkState.UNASKED

    made = driver()
    made.need(A, 0, 1)
    made.fail(1, FailureKind.NOT_FOUND)
    assert {word(made, chunk).state for chunk in (0, 5)} == {ChunkState.GIVEN_UP}


def test_a_chunk_whose_last_mirror_named_a_later_time() -> None:
    made = driver("one", "two")
    made.need(A, 0, 1)
    made.mismatch(1)
    made.fail(max(made.jobs), FailureKind.BUSY, retry_after=3.0)
    for job in list(made.jobs):
        made.done(job)
    assert word(made, 0) == ChunkWord(0, ChunkState.PUT_OFF, 1, rest=3.25)


def test_a_whole_stream_waits_for_what_is_in_flight() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.need(A, 5, 6)
    made.fail(1, FailureKind.NO_RANGES)
    while word(made, 0).state not in (ChunkState.BLOCKED, ChunkState.FETCHING):
        made.sleep_until_alarm()
    assert word(made, 0).state is ChunkState.BLOCKED


def test_a_reader_for_whom_there_is_no_room() -> None:
    made = driver()
    made.limit(MIB, MIB)
    made.need(A, 0, 2)
    made.land(1)
    made.done(1)
    assert word(made, 1) == ChunkWord(1, ChunkState.NO_ROOM, 1)

"""Room is reserved before a fetch: nothing begins that would not fit, background stops first, and readers are told."""

from __future__ import annotations

from weightfs.core import plan
from weightfs.core.geometry import MIB, BlobShape
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

A, B = blob_id(1), blob_id(2)
ONE = mirrors("one")


def driver(count: int = 32, **limits: int) -> PlanDriver:
    made = PlanDriver(Limits(**limits))
    made.add(A, BlobShape(count * MIB, MIB), ONE)
    made.add(B, BlobShape(count * MIB, MIB), ONE)
    return made


def asked(made: PlanDriver) -> list[tuple[object, Priority]]:
    return [(one.blob, one.priority) for one in made.commands if isinstance(one, plan.NeedRoom)]


def run_all(made: PlanDriver) -> None:
    while made.jobs:
        job = next(iter(made.jobs))
        while made.jobs[job].todo:
            made.land(job, durable=True)
        made.done(job)


def test_a_demand_is_cut_to_what_fits_and_the_rest_waits_for_room() -> None:
    made = driver()
    made.limit(5 * MIB, 5 * MIB)
    reader = made.need(A, 0, 8)
    assert sum(len(job.todo) for job in made.jobs.values()) == 5
    run_all(made)
    assert asked(made) == [(A, Priority.DEMAND)]  # once
    assert made.planner.short() == {A: Priority.DEMAND}
    assert made.planner.demanded_bytes() == 3 * MIB
    made.limit(8 * MIB, 8 * MIB)
    run_all(made)
    assert made.woken == {reader: None}
    assert made.planner.short() == {}


def test_what_is_in_flight_counts_before_it_lands_and_is_given_back_if_it_fails() -> None:
    made = driver()
    made.limit(4 * MIB, 4 * MIB)
    assert made.planner.next_job == 1
    made.need(A, 0, 4)
    assert made.planner.next_job == 2
    assert made.planner.held_bytes == made.planner.reserved_bytes == 4 * MIB
    assert made.planner.holding(A) == 0  # nothing in its file yet
    assert not made.planner.is_short
    other = made.need(B, 0, 4)
    assert len(made.jobs) == 1
    made.withdraw(1)
    made.fail(1, FailureKind.RESET)
    assert made.planner.held_bytes == 4 * MIB  # it is the other's now
    run_all(made)
    assert made.woken == {other: None}


def test_background_stops_before_demand() -> None:
    made = driver()
    made.limit(6 * MIB, 3 * MIB)
    made.fill(A)
    run_all(made)
    assert len(made.blobs[A].present) == 3
    assert asked(made) == [(A, Priority.FILL)]
    made.want(B, 0, 3)
    assert not made.jobs
    reader = made.need(B, 0, 3)
    run_all(made)
    assert made.woken == {reader: None}
    made.no_room()  # nobody waits: background is paused, and nobody is told
    assert made.planner.short()[A] is Priority.FILL


def test_evicting_lets_it_go_on_and_dropping_alone_does_not() -> None:
    made = driver()
    made.limit(4 * MIB, 4 * MIB)
    made.need(A, 0, 4)
    run_all(made)
    reader = made.need(B, 0, 2)
    made.drop(A, [0, 1])
    made.punch(A)
    assert not made.jobs
    assert made.planner.held_bytes == 4 * MIB  # their room was not given back
    made.drop(A, [2])
    made.punch(A, freed=True)
    run_all(made)
    assert made.woken[reader] is None


def test_what_has_its_room_already_needs_no_more() -> None:
    """A chunk that went bad in a full cache can be fetched again."""
    made = driver()
    made.limit(4 * MIB, 2 * MIB)
    made.need(A, 0, 4)
    run_all(made)
    made.drop(A, [1])
    made.punch(A)
    reader = made.need(A, 0, 4)
    run_all(made)
    assert made.woken[reader] is None
    assert made.planner.held_bytes == 4 * MIB


def test_readers_of_what_does_not_fit_are_told_and_only_they() -> None:
    made = driver()
    made.add(blob_id(3), BlobShape(2 * MIB, MIB), ONE, kept=[0, 1])
    made.limit(3 * MIB, 3 * MIB)
    fits, does_not = made.need(A, 0, 1), made.need(B, 0, 2)
    kept = made.need(blob_id(3), 0, 2)
    made.no_room()
    failure = made.woken[does_not]
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.NO_SPACE
    run_all(made)
    assert made.woken[fits] is None
    assert made.woken[kept] is None
    again = made.need(B, 0, 2)  # asked once more, and told once more
    assert again not in made.woken
    assert asked(made) == [(B, Priority.DEMAND)] * 2
    made.no_room()
    assert made.woken[again] is not None


def test_a_whole_stream_fits_as_a_whole_or_does_not_begin() -> None:
    made = driver(count=8)
    made.limit(7 * MIB, 7 * MIB)
    made.need(A, 0, 1)
    made.fail(1, FailureKind.NO_RANGES)
    assert not made.jobs
    assert made.planner.short() == {A: Priority.DEMAND}
    assert made.planner.demanded_bytes() == made.planner.lacking_bytes(A) == 8 * MIB  # for one chunk of it
    made.limit(8 * MIB, 8 * MIB)
    (job,) = made.jobs.values()
    assert job.fetch.whole


def test_a_removed_blob_leaves_its_room_when_its_jobs_have_ended() -> None:
    made = driver(count=4)
    made.add(blob_id(3), BlobShape(2 * MIB, MIB), ONE, present=[0], kept=[1])
    made.limit(6 * MIB, 6 * MIB)
    made.need(blob_id(3), 1, 2)
    made.need(A, 0, 4)
    assert made.planner.held_bytes == 6 * MIB
    made.remove(blob_id(3))
    assert made.planner.held_bytes == 5 * MIB
    assert made.planner.busy_blobs() == {A, blob_id(3)}
    made.need(B, 0, 2)
    made.land(1)
    assert made.planner.held_bytes == 6 * MIB
    run_all(made)
    assert len(made.blobs[B].present) == 2
    made.need(B, 2, 3)
    made.remove(B)
    assert made.planner.short() == {}


def test_a_reader_behind_one_whose_bytes_do_not_fit_is_not_told_what_is_not_so() -> None:
    made = PlanDriver()
    made.add(A, BlobShape(4 * MIB, MIB), ONE, kept=[1])
    made.limit(MIB, MIB)
    first, second = made.need(A, 0, 1), made.need(A, 1, 2)
    made.no_room()
    assert made.woken[first] is not None
    run_all(made)
    assert made.woken[second] is None


def test_a_fill_that_is_asked_for_again_asks_for_room_again() -> None:
    """A pull of what stands still for want of room is to be told so at once."""
    made = driver()
    made.limit(MIB, 0)
    made.fill(A)
    assert asked(made) == [(A, Priority.FILL)]
    made.fill(A)
    assert asked(made) == [(A, Priority.FILL)] * 2
    made.need(A, 0, 2)
    run_all(made)
    made.fill(A)  # a reader waits for room already: nothing new
    assert asked(made) == [*[(A, Priority.FILL)] * 2, (A, Priority.DEMAND)]


def test_a_chunk_whose_room_was_kept_is_fetched_although_more_is_held_than_may_be() -> None:
    """It was neither fetched nor refused: its reader waited for its whole read_timeout."""
    made = PlanDriver()
    made.limit(0, 0)
    made.add(A, BlobShape(2 * MIB, MIB), mirrors("one"), kept=[0])
    waiter = made.need(A, 0, 1)
    (job,) = made.jobs
    made.land(job)
    assert made.woken == {waiter: None}


def test_no_room_is_made_for_a_reader_who_has_gone() -> None:
    made = PlanDriver()
    made.limit(0, 0)
    made.add(A, BlobShape(2 * MIB, MIB), mirrors("one"))
    made.withdraw(made.need(A, 0, 1))
    assert not made.planner.demanded_bytes()
    made.fill(A)
    assert made.planner.short() == {A: plan.Priority.FILL}


def test_room_that_is_given_back_while_its_chunk_is_fetched_again_still_counts() -> None:
    """Who lands there needs it: it stays held, as the job's."""
    made = driver()
    made.need(A, 0, 1)
    run_all(made)
    made.drop(A, [0])
    made.punch(A)
    made.need(A, 0, 1)
    assert made.planner.held_bytes == MIB
    made.punch(A, freed=True)
    assert made.planner.held_bytes == MIB
    assert made.planner.reserved_bytes == MIB
    assert not made.planner.check()
    run_all(made)
    assert made.planner.held_bytes == MIB

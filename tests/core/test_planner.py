"""Rules of the planner by example: order, slots, bytes, trims, waiters, drops, removal. Faults: test_planner_faults."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MIB, BlobShape, ChunkSpan
from weightfs.core.plan import Limits, Priority
from weightfs.core.planner import MAX_WANTS, Planner
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

A, B, C = blob_id(1), blob_id(2), blob_id(3)
ONE = mirrors("one")


def driver(count: int = 64, **limits: int) -> PlanDriver:
    made = PlanDriver(Limits(**limits))
    made.add(A, BlobShape(count * MIB, MIB), ONE)
    return made


def fetches(made: PlanDriver, since: int = 0) -> list[tuple[int, int, Priority]]:
    found = [command for command in made.commands[since:] if isinstance(command, plan.Fetch)]
    return [(fetch.span.start, fetch.span.stop, fetch.priority) for fetch in found]


def run_all(made: PlanDriver) -> None:
    """Every job lands all that it has and ends, the oldest first."""
    while made.jobs:
        job = next(iter(made.jobs))
        while made.jobs[job].todo:
            made.land(job, durable=True)
        made.done(job)


# ---- answers


def test_a_need_for_what_is_present_is_answered_at_once() -> None:
    made = PlanDriver()
    made.add(A, BlobShape(4 * MIB, MIB), ONE, present=[1, 2])
    assert made.need(A, 1, 3) in made.woken
    assert made.need(A, 2, 2) in made.woken  # nothing at all is always there
    assert not made.jobs


def test_a_waiter_is_woken_when_its_last_chunk_landed_not_when_the_job_ends() -> None:
    made = driver()
    first, second = made.need(A, 0, 2), made.need(A, 1, 2)
    (job,) = made.jobs
    made.land(job)
    assert made.woken == {}
    made.land(job)
    assert made.woken == {first: None, second: None}
    assert job in made.jobs


def test_regression_a_need_for_a_removed_blob_is_answered() -> None:
    """It was ignored, and the reader waited for its whole read_timeout."""
    planner = Planner()
    (wake,) = planner.feed(plan.Need(7, A, ChunkSpan(0, 1)), 0.0)
    assert isinstance(wake, plan.Wake)
    assert wake.waiter == 7
    assert wake.failure is not None
    assert wake.failure.kind is FailureKind.CANCELLED
    assert planner.feed(plan.Want(A, ChunkSpan(0, 1)), 0.0) == []


def test_regression_a_chunk_dropped_while_its_reader_waits_for_another_is_fetched_again() -> None:
    """The reader was woken with a hole in its span: zeros of a punched file would have been its answer."""
    made = driver()
    reader = made.need(A, 0, 2)
    (job,) = made.jobs
    made.land(job)
    made.drop(A, [0])
    made.land(job)
    assert made.woken == {}
    made.punch(A)
    (again,) = [number for number in made.jobs if number != job]
    made.land(again)
    assert made.woken == {reader: None}


def test_nothing_is_fetched_for_a_reader_that_withdrew_before_its_turn_and_all_of_it_after() -> None:
    made = driver(max_jobs=1)
    made.need(A, 0, 1)
    second = made.need(A, 5, 6)
    made.withdraw(second)
    made.withdraw(second)  # nobody of that number any more
    (job,) = made.jobs
    made.withdraw(1)
    assert job in made.jobs  # no byte on its way is thrown away
    run_all(made)
    assert made.fetched == [(A, 0)]


def test_one_reader_of_a_chunk_withdraws_and_the_other_is_served() -> None:
    made = driver(max_jobs=1)
    made.need(A, 9, 10)
    first, second = made.need(A, 3, 4), made.need(A, 3, 4)
    made.withdraw(first)
    run_all(made)
    assert second in made.woken
    assert first not in made.woken


# ---- who goes first


def test_a_job_is_urgent_from_when_a_reader_waits_for_it_until_it_ends() -> None:
    made = driver(count=4)
    made.fill(A)
    job = min(made.jobs)
    assert not made.planner.urgent(job)
    made.need(A, 0, 1)
    assert made.planner.urgent(job)
    run_all(made)
    assert not made.planner.urgent(job)


def test_demand_goes_before_read_ahead_and_read_ahead_before_fill() -> None:
    made = driver(max_jobs=1, background_jobs=1)
    made.need(A, 0, 1)
    made.fill(A)
    made.want(A, 8, 9)
    made.need(A, 4, 5)
    run_all(made)
    order = fetches(made)
    assert [priority for *_, priority in order[:4]] == [
        Priority.DEMAND,
        Priority.DEMAND,
        Priority.READAHEAD,
        Priority.FILL,
    ]


def test_the_newest_window_of_read_ahead_goes_first_on_four_connections() -> None:
    made = driver(max_jobs=1, background_jobs=1)
    made.need(A, 63, 64)
    made.want(A, 0, 8)
    made.want(A, 16, 32)
    run_all(made)
    assert fetches(made)[1:5] == [(start, start + 4, Priority.READAHEAD) for start in (16, 20, 24, 28)]
    assert fetches(made)[5] == (0, 2, Priority.READAHEAD)


def test_only_so_many_windows_are_remembered() -> None:
    made = driver(max_jobs=1)
    made.need(A, 63, 64)
    for start in range(MAX_WANTS + 4):
        made.want(A, start, start + 1)
    run_all(made)
    assert sorted(chunk for _, chunk in made.fetched) == [*range(4, MAX_WANTS + 4), 63]


def test_fill_completes_a_blob_from_behind_the_last_reader_and_wraps() -> None:
    made = driver(count=8, max_jobs=1, background_jobs=1, first_job_bytes=1)
    made.need(A, 4, 5)
    made.fill(A)
    for _ in range(8):  # without time passing, the line's speed stays unknown
        (job,) = made.jobs
        made.land(job, durable=True)
        made.done(job)
    assert [chunk for _, chunk in made.fetched] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_the_size_of_fill_requests_follows_the_speed_of_the_line() -> None:
    made = driver(max_jobs=1, background_jobs=1)
    made.fill(A)
    assert fetches(made)[-1][:2] == (0, 2)
    (job,) = made.jobs
    made.land(job, durable=True)
    made.now += 0.5
    made.land(job, durable=True)  # 2 MiB in half a second
    made.done(job)
    assert fetches(made)[-1][:2] == (2, 6)
    (job,) = made.jobs
    made.now += 1e6
    for _ in range(4):
        made.land(job, durable=True)
    made.done(job)  # 4 MiB in eleven days: smoothed to 0.7 times 4 MiB/s
    assert fetches(made)[-1][:2] == (6, 8)


def test_fill_can_be_switched_off_and_goes_on_for_what_is_dropped() -> None:
    made = driver(count=4)
    made.fill(A, on=False)
    assert not made.jobs
    made.fill(A)
    made.fill(A)
    run_all(made)
    assert made.blobs[A].present.full
    made.drop(A, [2])
    made.punch(A)
    run_all(made)
    assert made.blobs[A].present.full


def test_a_pause_holds_fill_back_and_no_reader() -> None:
    made = driver(first_job_bytes=MIB)
    made.pause(A)
    made.fill(A)
    assert not made.jobs
    waiter = made.need(A, 3, 4)
    made.want(A, 9, 10)
    assert fetches(made) == [(3, 4, Priority.DEMAND), (9, 10, Priority.READAHEAD)]
    run_all(made)
    assert made.woken == {waiter: None}
    made.pause(A, on=False)
    assert made.planner.paused(A) is False
    run_all(made)
    assert made.planner.present(A).full


def test_a_pause_stops_a_stream_that_nobody_waits_for() -> None:
    for somebody_waits in (False, True):
        made = driver()
        made.fill(A)
        for job in list(made.jobs):
            made.fail(job, FailureKind.NO_RANGES)
        (stream,) = [job for job, model in made.jobs.items() if model.fetch.whole]
        if somebody_waits:
            made.need(A, 60, 61)
        made.pause(A)
        assert made.jobs[stream].stopped is not somebody_waits
        if not somebody_waits:
            made.fail(stream, FailureKind.CANCELLED)
            assert not made.jobs
            made.need(A, 60, 61)
            made.sleep_until_alarm()
            assert made.jobs


def test_blobs_are_filled_one_after_another_and_the_one_that_is_read_first() -> None:
    made = driver(count=2, max_jobs=1, background_jobs=1, first_job_bytes=1)
    made.need(A, 0, 1)
    for blob in (B, C):
        made.add(blob, BlobShape(3 * MIB, MIB), ONE)
        made.fill(blob)
    made.fill(A)
    made.need(C, 2, 3)
    run_all(made)
    assert made.fetched == [(A, 0), (C, 2), (C, 0), (C, 1), (B, 0), (B, 1), (B, 2), (A, 1)]


def test_regression_readers_of_one_blob_do_not_starve_those_of_another() -> None:
    """Demand was served blob by blob, the oldest first: a busy blob kept every other reader waiting."""
    made = driver(max_jobs=1)
    for chunk in range(0, 20, 2):
        made.need(A, chunk, chunk + 1)
    made.add(B, BlobShape(MIB, MIB), ONE)
    made.need(B, 0, 1)
    run_all(made)
    assert (B, 0) in made.fetched[:3]


# ---- slots


def test_background_never_takes_demands_own_slots() -> None:
    made = driver(max_jobs=6, background_jobs=4, first_job_bytes=1)
    made.want(A, 0, 4)
    made.fill(A)
    assert len(made.jobs) == 4
    made.need(A, 40, 41)
    made.need(A, 50, 51)
    assert [priority for *_, priority in fetches(made)[4:]] == [Priority.DEMAND] * 2


def test_regression_a_promoted_job_keeps_its_background_slot() -> None:
    """Lifting a fill job to DEMAND freed its slot for one more fill: readers could be left without any."""
    made = driver(max_jobs=4, background_jobs=2, fill_jobs_under_demand=2, first_job_bytes=1)
    made.fill(A)
    assert len(made.jobs) == 2
    made.need(A, 0, 1)
    made.need(A, 1, 2)
    assert {job.priority for job in made.planner.jobs(0.0)} == {Priority.DEMAND}
    assert len(made.jobs) == 2


def test_while_a_reader_waits_fill_keeps_few_slots() -> None:
    made = driver(max_jobs=8, background_jobs=6, fill_jobs_under_demand=2, first_job_bytes=1)
    made.need(A, 40, 41)
    made.fill(A)
    assert [priority for *_, priority in fetches(made)].count(Priority.FILL) == 2
    made.land(1)
    assert [priority for *_, priority in fetches(made)].count(Priority.FILL) == 6


# ---- bytes


def test_requests_are_cut_at_the_cap() -> None:
    made = driver(job_bytes=3 * MIB)
    made.need(A, 0, 7)
    assert [fetch[:2] for fetch in fetches(made)] == [(0, 3), (3, 6), (6, 7)]


def test_what_is_not_durable_bounds_what_is_fetched() -> None:
    made = driver(
        unsettled_bytes=8 * MIB, background_unsettled_bytes=4 * MIB, first_job_bytes=1, background_jobs=12
    )
    made.fill(A)
    assert len(made.jobs) == 4
    for job in list(made.jobs):
        made.land(job)
        made.done(job)
    assert not made.jobs
    made.need(A, 32, 48)  # demand may go further: 4 of 8 MiB
    assert sum(len(job.todo) for job in made.jobs.values()) == 4
    made.durable(A, 2 * MIB)
    assert sum(len(job.todo) for job in made.jobs.values()) == 6
    made.durable(A)
    made.finish({A: 0}, others=FailureKind.RESET)


@pytest.mark.parametrize("background", [True, False])
def test_a_chunk_larger_than_every_bound_still_goes_one_at_a_time(background: bool) -> None:
    made = PlanDriver(
        Limits(unsettled_bytes=MIB, background_unsettled_bytes=MIB, budget_bytes=MIB, job_bytes=MIB)
    )
    made.add(A, BlobShape(12 * MIB, 4 * MIB), ONE)
    if background:
        made.fill(A)
    else:
        made.need(A, 0, 3)
    for chunk in range(3):
        (job,) = made.jobs
        assert made.land(job) == chunk
        made.done(job)
        assert not made.jobs
        made.durable(A)
    assert made.blobs[A].present.full


def test_the_budget_bounds_background_over_all_blobs_and_never_demand() -> None:
    made = driver(budget_bytes=4 * MIB, first_job_bytes=2 * MIB)
    made.add(B, BlobShape(8 * MIB, MIB), ONE)
    made.fill(A)
    made.fill(B)
    assert [fetch[:2] for fetch in fetches(made)] == [(0, 2), (2, 4)]
    made.need(B, 0, 4)
    assert fetches(made)[-1] == (0, 4, Priority.DEMAND)


def test_what_became_durable_of_a_former_life_never_counts_below_zero() -> None:
    made = driver(unsettled_bytes=2 * MIB)
    made.feed(plan.Durable(A, 100 * MIB))
    made.need(A, 0, 4)
    assert sum(len(job.todo) for job in made.jobs.values()) == 2


# ---- promotion and trim


def test_a_chunk_far_behind_in_a_fill_job_is_taken_out_of_it() -> None:
    made = driver(first_job_bytes=8 * MIB, background_jobs=1)
    made.fill(A)
    (job,) = made.jobs
    reader = made.need(A, 5, 6)
    assert made.commands[-1] == plan.Trim(job, 5)
    made.need(A, 5, 7)  # one trim at a time
    assert made.jobs[job].trim == 5
    made.trimmed(job)
    assert fetches(made)[-1] == (5, 7, Priority.DEMAND)
    made.land(max(made.jobs))
    assert reader in made.woken
    assert made.jobs[job].todo == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("chunk", [0, 1])
def test_regression_a_job_that_is_near_the_chunk_is_lifted(chunk: int) -> None:
    """The second chunk of a fill job was neither taken out nor was the job lifted."""
    made = driver(first_job_bytes=8 * MIB, background_jobs=1)
    made.fill(A)
    made.need(A, chunk, chunk + 1)
    assert not any(isinstance(command, plan.Trim) for command in made.commands)
    assert [job.priority for job in made.planner.jobs(0.0)] == [Priority.DEMAND]


def test_regression_a_chunk_behind_others_that_nobody_waits_for_is_taken_out_of_a_lifted_job() -> None:
    """Once a job was lifted for its first chunk, its last one was never taken out: a wait of seven chunks."""
    made = driver(first_job_bytes=8 * MIB, background_jobs=1)
    made.fill(A)
    made.need(A, 0, 1)
    made.need(A, 7, 8)
    assert made.commands[-1] == plan.Trim(1, 7)


def test_a_chunk_behind_others_that_are_waited_for_stays() -> None:
    made = driver()
    made.need(A, 0, 8)
    made.need(A, 7, 8)
    assert not any(isinstance(command, plan.Trim) for command in made.commands)


def test_regression_who_comes_for_an_earlier_chunk_during_a_trim_is_seen_afterwards() -> None:
    made = driver(first_job_bytes=8 * MIB, background_jobs=1)
    made.fill(A)
    made.need(A, 7, 8)
    made.need(A, 3, 4)
    made.trimmed(1)
    assert plan.Trim(1, 3) in made.commands
    made.trimmed(1, late=1)  # the job has passed it: asked once, not again and again
    assert made.jobs[1].trim is None
    assert made.jobs[1].todo == [0, 1, 2, 3]
    run_all(made)
    assert not made.waiting


def test_a_trim_that_the_job_has_passed_changes_nothing() -> None:
    made = driver(first_job_bytes=4 * MIB, background_jobs=1)
    made.fill(A)
    reader = made.need(A, 3, 4)
    for _ in range(4):
        made.land(1)
    assert reader in made.woken
    made.trimmed(1)
    made.done(1)
    assert made.planner.feed(plan.Trimmed(1, 0), 0.0) == []  # after the end: of no job
    assert made.planner.feed(plan.Landed(1, 0), 0.0) == []


def test_a_job_that_ends_instead_of_answering_a_trim_leaves_its_chunks_to_the_reader() -> None:
    for end in ("done", "cancelled"):
        made = driver(first_job_bytes=8 * MIB, background_jobs=1)
        made.fill(A)
        made.need(A, 5, 6)
        if end == "done":
            made.done(1)
        else:
            made.fail(1, FailureKind.CANCELLED)  # it was still in the queue
        assert (5, 6, Priority.DEMAND) in fetches(made)  # at once: it was asked to end


def test_a_chunk_that_a_job_does_not_have_cannot_land_or_mismatch() -> None:
    made = driver()
    made.need(A, 0, 1)
    assert made.planner.feed(plan.Landed(1, 5), 0.0) == []
    assert made.planner.feed(plan.Mismatched(1, 5, plan.Failure(FailureKind.MISMATCH, "x")), 0.0) == []
    assert made.planner.check() == []


# ---- drops and removal


def test_a_dropped_chunk_is_fetched_only_after_it_was_punched() -> None:
    made = PlanDriver()
    made.add(A, BlobShape(2 * MIB, MIB), ONE, present=[0, 1])
    made.drop(A, [0])
    reader = made.need(A, 0, 2)
    assert not made.jobs
    made.punch(A)
    made.feed(plan.Punched(A, [0, 1]))  # once more, and of what was not dropped
    made.feed(plan.Dropped(A, [0]))
    run_all(made)
    assert made.woken == {reader: None}


def test_removal_wakes_readers_and_stops_jobs() -> None:
    made = driver()
    readers = [made.need(A, 0, 2), made.need(A, 1, 2)]
    made.remove(A)
    assert [made.woken[reader] is not None for reader in readers] == [True, True]
    assert made.jobs[1].stopped
    assert made.planner.busy(A)
    assert not made.planner.knows(A)
    made.land(1)  # it was on its way
    made.mismatch(1)
    made.fail(1, FailureKind.CANCELLED)
    made.feed(plan.Removed(A))
    assert made.planner.idle()
    assert not made.planner.busy(A)


def test_a_stopped_job_may_also_say_done() -> None:
    made = driver()
    made.need(A, 0, 2)
    made.remove(A)
    made.done(1)
    assert made.planner.idle()


def test_regression_a_blob_that_comes_back_waits_for_the_jobs_of_its_former_life() -> None:
    """A KeyError took the engine down, and two jobs could have written one chunk of the same file."""
    made = driver()
    made.need(A, 0, 2)
    made.remove(A)
    made.add(A, BlobShape(64 * MIB, MIB), ONE)
    reader = made.need(A, 0, 2)
    assert list(made.jobs) == [1]
    made.land(1)
    made.fail(1, FailureKind.CANCELLED)
    assert list(made.jobs) == [2]
    run_all(made)
    assert made.woken[reader] is None


def test_a_blob_cannot_be_added_twice() -> None:
    made = driver()
    with pytest.raises(ValueError, match="twice"):
        made.add(A, BlobShape(MIB, MIB), ONE)


def test_chunks_outside_a_blob_are_refused() -> None:
    with pytest.raises(IndexError):
        driver(count=2).planner.feed(plan.Need(1, A, ChunkSpan(1, 3)), 0.0)


# ---- what the driver may ask


def test_status() -> None:
    made = driver()
    planner = made.planner
    assert planner.idle()
    made.need(A, 2, 4)
    made.need(A, 3, 4)
    (job,) = planner.jobs(5.0)
    assert (job.job, job.blob, job.chunks, job.mirror) == (1, A, ChunkSpan(2, 4), "http://one/x")
    assert (job.priority, job.age, job.nbytes_left) == (Priority.DEMAND, 5.0, 2 * MIB)
    assert planner.waiting() == planner.waiting(A) == 2
    assert not planner.idle()
    assert planner.busy(A)
    run_all(made)
    assert list(planner.present(A)) == [2, 3]
    assert [score.nbytes for score in planner.scores(A)] == [2 * MIB]
    assert planner.failure(A) is planner.stuck(A) is planner.stuck(B) is None


def test_check_tells_what_is_wrong() -> None:
    made = driver()
    made.need(A, 0, 2)
    ledger = made.planner._ledger
    (job,) = ledger.jobs.values()
    blob = ledger.blobs[A]
    blob.present.add(0)
    blob.demand[9] = None
    blob.waiting[7] = {1}
    blob.inflight += 1
    ledger.inflight += 2
    blob.owner[5] = 1
    ledger.waiters[1].missing.clear()
    made.planner._ledger.jobs[99] = type(job)(99, blob, 0, job.issued, job.priority, 0.0, {0}, 0, whole=False)
    text = "\n".join(made.planner.check())
    for words in (
        "two jobs",
        "taken set",
        "not those that it says",
        "which is present",
        "not either taken or in the queue",
        "nobody waits for them",
        "bytes said to be in flight",
        "waits for nothing",
    ):
        assert words in text


# ---- against a naive planner


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 24), fill=st.booleans())
def test_the_same_chunks_as_a_naive_planner(data: st.DataObject, count: int, fill: bool) -> None:
    """The reference fetches one chunk per fetch, for each read in turn, if it is not there."""
    chunks = st.integers(0, count - 1)
    present = data.draw(st.sets(chunks))
    reads = data.draw(st.lists(st.tuples(chunks, st.integers(1, 6)), max_size=8))
    naive = set(present)
    for start, length in reads:
        for chunk in range(start, min(count, start + length)):
            naive.add(chunk)
    if fill:
        naive |= set(range(count))

    made = PlanDriver(Limits(max_jobs=3, background_jobs=2, job_bytes=4 * MIB, unsettled_bytes=5 * MIB))
    made.add(A, BlobShape(count * MIB, MIB), mirrors("one", "two"), present)
    if fill:
        made.fill(A)
    for start, length in reads:
        made.need(A, start, min(count, start + length))
        for job in list(made.jobs):
            match data.draw(st.sampled_from(["wait", "land", "fail"])):
                case "land" if made.jobs[job].todo:
                    made.land(job, durable=True)
                case "fail":
                    made.fail(job, FailureKind.RESET)
                case _:
                    pass
    for _ in range(1000):
        run_all(made)
        if not made.waiting and (not fill or made.blobs[A].present.full):
            break
        made.sleep_until_alarm()
    assert set(made.blobs[A].present) == naive
    assert len(made.fetched) == len(set(made.fetched)) == len(naive - present)
    assert set(made.woken.values()) <= {None}


# ---- cost


def test_an_event_looks_at_few_of_many_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 blobs to fill and 1,000 readers: what one landed chunk costs does not grow with them."""

    def looks(blobs: int, readers: int) -> int:
        made = Planner()
        for number in range(blobs):
            have = BlobShape(64 * MIB, MIB)
            made.feed(plan.Added(blob_id(number), have, ONE, ChunkSet(64)), 0.0)
            made.feed(plan.Fill(blob_id(number), on=True), 0.0)
        for number in range(readers):
            made.feed(
                plan.Need(number, blob_id(number % blobs), ChunkSpan(number % 60, number % 60 + 2)), 0.0
            )
        seen = 0
        scheduler = type(made._scheduler)
        paused = scheduler._paused

        def counting(blob: object, now: float) -> bool:
            nonlocal seen
            seen += 1
            return bool(paused(blob, now))  # type: ignore[arg-type]  # what it was given

        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "_paused", staticmethod(counting))
            for job in made.jobs(0.0)[:8]:
                made.feed(plan.Landed(job.job, job.chunks.start), 1.0)
                made.feed(plan.Durable(job.blob, MIB), 1.0)
        return seen

    assert looks(500, 1000) <= looks(20, 40) + 16


def test_background_that_is_switched_off_begins_nothing_and_goes_on_afterwards() -> None:
    made = driver(8)
    made.set_background(on=False)
    made.fill(A)
    made.want(A, 4, 6)
    assert not made.jobs
    made.need(A, 1, 2)
    assert fetches(made) == [(1, 2, Priority.DEMAND)]
    made.set_background(on=True)
    assert {4, 5} < {chunk for model in made.jobs.values() for chunk in model.todo}
    run_all(made)
    assert made.blobs[A].present.full


def test_jobs_are_numbered_from_where_the_driver_says() -> None:
    made = PlanDriver()
    made.planner = Planner(made.limits, first_job=1 << 40)
    made.add(A, BlobShape(8 * MIB, MIB), ONE)
    made.need(A, 0, 1)
    made.need(A, 3, 4)
    assert list(made.jobs) == [1 << 40, (1 << 40) + 1]

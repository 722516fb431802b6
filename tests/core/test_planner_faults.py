"""What the planner does about faults, by example: turns, pauses, Retry-After, holds, mirrors without ranges."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfs.core import plan
from weightfs.core.geometry import MIB, BlobShape
from weightfs.core.manifest import Mirror
from weightfs.core.plan import Limits, Priority
from weightfs.core.retry import is_permanent
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

A, B = blob_id(1), blob_id(2)
TRANSIENT = [
    FailureKind.CONNECT,
    FailureKind.TIMEOUT,
    FailureKind.STALL,
    FailureKind.RESET,
    FailureKind.SHORT,
]
PERMANENT = [
    FailureKind.REDIRECT,
    FailureKind.TLS,
    FailureKind.AUTH,
    FailureKind.NOT_FOUND,
    FailureKind.CHANGED,
]


def driver(*names: str, count: int = 8, max_retries: int | None = None, **limits: int) -> PlanDriver:
    made = PlanDriver(Limits(max_retries=max_retries, **limits))
    made.add(A, BlobShape(count * MIB, MIB), mirrors(*(names or ("one",))))
    return made


def only(made: PlanDriver) -> int:
    (job,) = made.jobs
    return job


def asked(made: PlanDriver) -> list[int]:
    return [command.mirror for command in made.commands if isinstance(command, plan.Fetch)]


def gave_up(made: PlanDriver) -> list[tuple[FailureKind, int, float]]:
    found = [command for command in made.commands if isinstance(command, plan.GaveUp)]
    return [(command.failure.kind, command.failure.chunk, command.until) for command in found]


# ---- turns and pauses


def test_back_off_comes_only_after_every_living_mirror_had_its_turn() -> None:
    made = driver("one", "two", "three")
    made.need(A, 0, 1)
    for _ in range(3):
        assert made.now == 0.0
        made.fail(only(made), FailureKind.RESET)
    assert sorted(asked(made)) == [0, 1, 2]
    assert not made.jobs
    assert made.alarm == 0.25  # half of the base of 0.5 s
    made.sleep_until_alarm()
    for _ in range(3):
        made.fail(only(made), FailureKind.RESET)
    assert sorted(asked(made)[3:]) == [0, 1, 2]
    assert made.alarm == 0.25 + 0.5  # twice as long
    assert not made.woken


def test_regression_a_mirror_that_is_benched_long_still_has_its_turn() -> None:
    """The mirror with the shorter bench was asked again and again, at each pause of half a second, for an hour."""
    made = driver("one", "two", count=2)
    made.need(A, 0, 1)
    first = asked(made)[0]
    made.mismatch(only(made))  # benched for a minute
    made.land(only(made) if len(made.jobs) == 1 else max(made.jobs))
    for job in list(made.jobs):
        made.done(job)
    made.need(A, 1, 2)
    assert asked(made)[-1] != first
    made.fail(only(made), FailureKind.RESET)
    assert asked(made)[-1] == first


def test_parallel_jobs_that_fail_together_are_one_trouble() -> None:
    made = driver(count=16)
    for chunk in range(0, 16, 2):
        made.need(A, chunk, chunk + 1)
    for job in list(made.jobs):
        made.fail(job, FailureKind.RESET)
    assert made.alarm == 0.25
    made.sleep_until_alarm()
    assert len(made.jobs) == 8


def test_regression_parallel_failures_of_two_mirrors_are_two_turns() -> None:
    """The second mirror's failure was taken for the first one's, so that its turn did not count."""
    made = driver("one", "two")
    made.need(A, 0, 1)
    made.need(A, 4, 5)
    assert sorted(asked(made)) == [0, 1]
    first, second = made.jobs
    made.now = 5.0
    made.fail(first, FailureKind.TIMEOUT)
    made.now = 6.0
    made.fail(second, FailureKind.TIMEOUT)
    assert made.alarm == 6.25


def test_regression_bytes_of_an_older_job_do_not_end_a_pause() -> None:
    """An origin that answers 429 to new requests still serves old ones: each landing asked it again at once."""
    made = driver()
    made.need(A, 0, 2)
    made.need(A, 4, 5)
    first, second = made.jobs
    made.fail(second, FailureKind.BUSY, retry_after=60.0)
    made.land(first)
    made.need(A, 6, 7)
    assert list(made.jobs) == [first]
    assert made.alarm == 60.25
    made.land(first)
    made.done(first)
    made.sleep_until_alarm()
    assert len(made.jobs) == 2


def test_bytes_of_an_older_job_do_not_shorten_the_pauses() -> None:
    made = driver()
    made.need(A, 0, 2)
    made.need(A, 4, 5)
    first, second = made.jobs
    made.fail(second, FailureKind.RESET)
    made.land(first)
    made.sleep_until_alarm()
    made.fail(max(made.jobs), FailureKind.RESET)
    assert made.alarm == 0.25 + 0.5


def test_an_alarm_that_passed_unheard_does_not_hide_the_next_one() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.fail(only(made), FailureKind.RESET)
    made.now = 1.0  # the driver is late, and something else comes before its Tick
    made.need(A, 4, 5)
    made.fail(max(made.jobs), FailureKind.RESET)
    assert made.commands[-1] == plan.SleepUntil(1.5)


def test_a_success_forgets_the_pauses_before_it() -> None:
    made = driver()
    made.need(A, 0, 8)
    for pause in (0.25, 0.5, 1.0):
        made.fail(only(made), FailureKind.CONNECT)
        assert made.alarm == made.now + pause
        made.sleep_until_alarm()
    made.land(only(made))
    made.fail(only(made), FailureKind.CONNECT)
    assert made.alarm == made.now + 0.25


@pytest.mark.parametrize("kind", TRANSIENT)
def test_transient_faults_are_retried_for_as_long_as_a_reader_waits(kind: FailureKind) -> None:
    made = driver()
    reader = made.need(A, 0, 1)
    for _ in range(40):
        made.fail(only(made), kind)
        made.sleep_until_alarm()
    assert made.now < 40 * 15.0  # half of the cap of 30 s
    made.land(only(made))
    assert made.woken == {reader: None}


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_max_retries_gives_up(retries: int) -> None:
    made = driver("one", "two", max_retries=retries)
    reader = made.need(A, 0, 1)
    for _ in range(retries):
        made.fail(only(made), FailureKind.RESET)
        made.fail(only(made), FailureKind.RESET)
        made.sleep_until_alarm()
    made.fail(only(made), FailureKind.RESET)
    assert not made.woken
    made.fail(only(made), FailureKind.RESET)
    failure = made.woken[reader]
    assert failure is not None
    assert failure.kind is FailureKind.RESET
    assert not made.jobs


# ---- Retry-After


def test_retry_after_is_honoured() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.fail(only(made), FailureKind.BUSY, retry_after=20.0)
    assert made.alarm == 20.25
    made.sleep(20.0)
    assert not made.jobs
    made.sleep_until_alarm()
    assert made.jobs


@pytest.mark.parametrize(("said", "waited"), [(1e9, 300.25), (-5.0, 0.25), (float("nan"), 0.25)])
def test_an_absurd_retry_after_is_bounded(said: float, waited: float) -> None:
    made = driver()
    made.need(A, 0, 1)
    failure = plan.Failure(FailureKind.BUSY, "busy", "", said)
    commands = made.planner.feed(plan.Failed(1, failure, 0.5), 0.0)
    assert commands == [plan.SleepUntil(waited)]


def test_regression_a_retry_after_holds_although_another_mirror_failed_later() -> None:
    """Only the last failure's Retry-After was looked at: the busy mirror was asked again at once."""
    made = driver("one", "two")
    made.need(A, 0, 1)
    busy = asked(made)[0]
    made.fail(only(made), FailureKind.BUSY, retry_after=60.0)
    for _ in range(8):  # PlanDriver asserts that nobody is asked too early
        assert asked(made)[-1] != busy
        made.fail(only(made), FailureKind.CONNECT)
        if not made.jobs:
            made.sleep_until_alarm()
    assert made.now < 60.0


def test_a_late_retry_after_of_a_parallel_job_prolongs_the_pause() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.need(A, 4, 5)
    first, second = made.jobs
    made.fail(first, FailureKind.BUSY)
    made.fail(second, FailureKind.BUSY, retry_after=60.0)
    made.sleep(1.0)
    assert not made.jobs
    assert made.alarm == 60.25


def test_one_chunk_waits_for_a_busy_mirror_and_the_others_go_on() -> None:
    made = driver("one", "two", count=4)
    reader = made.need(A, 0, 1)
    wrong = asked(made)[0]
    made.mismatch(only(made))
    made.fail(only(made) if len(made.jobs) == 1 else max(made.jobs), FailureKind.BUSY, retry_after=3.0)
    for job in list(made.jobs):
        made.done(job)
    other = made.need(A, 2, 3)
    late = made.need(A, 0, 1)  # of a chunk that is put off
    made.land(only(made))
    assert made.woken == {other: None}
    assert asked(made)[-1] == wrong
    made.done(only(made))
    made.sleep_until_alarm()
    made.sleep(1.0)
    made.land(only(made))
    assert made.woken == {other: None, reader: None, late: None}


def test_a_blob_waits_for_a_busy_mirror_when_the_other_one_died() -> None:
    made = driver("one", "two")
    reader = made.need(A, 0, 1)
    made.fail(only(made), FailureKind.BUSY, retry_after=60.0)
    made.fail(only(made), FailureKind.AUTH)
    assert not made.jobs
    made.sleep_until_alarm()
    assert made.now == 5.0  # the dead one has its next chance first
    made.fail(only(made), FailureKind.AUTH)
    made.sleep_until_alarm()
    assert made.now == 15.0
    made.land(only(made))
    assert made.woken == {reader: None}


# ---- giving up


@pytest.mark.parametrize("kind", PERMANENT)
def test_a_permanent_fault_of_the_only_mirror_is_told_at_once_and_remembered(kind: FailureKind) -> None:
    made = driver()
    reader = made.need(A, 0, 1)
    made.fail(only(made), kind)
    assert gave_up(made) == [(kind, -1, 5.0)]
    again = made.need(A, 0, 1)  # answered at once, and nobody is asked
    assert [made.woken[number] is not None for number in (reader, again)] == [True, True]
    assert not made.jobs
    for failure in (made.planner.failure(A), made.planner.stuck(A)):
        assert failure is not None
        assert failure.kind is kind
    made.sleep_until_alarm()
    assert made.planner.failure(A) is None
    third = made.need(A, 0, 1)
    made.fail(only(made), kind)
    assert gave_up(made)[-1] == (kind, -1, 5.0 + 10.0)
    assert made.woken[third] is not None
    made.sleep(10.0)
    fourth = made.need(A, 0, 1)
    made.land(only(made))
    assert made.woken[fourth] is None


def test_a_permanent_fault_of_one_mirror_leaves_the_others() -> None:
    made = driver("one", "two")
    reader = made.need(A, 0, 1)
    made.fail(only(made), FailureKind.NOT_FOUND)
    assert sorted(asked(made)) == [0, 1]
    made.land(only(made))
    assert made.woken == {reader: None}


def test_regression_a_dead_mirror_is_asked_again_while_the_other_fails_for_ever() -> None:
    """Dead was for ever unless all were: one 404 at a bad moment, and the honest mirror was lost."""
    made = driver("one", "two")
    made.need(A, 0, 1)
    dead = asked(made)[0]
    made.fail(only(made), FailureKind.NOT_FOUND)
    for _ in range(12):
        made.fail(only(made), FailureKind.CONNECT)
        if not made.jobs:
            made.sleep_until_alarm()
    assert dead in asked(made)[1:]


def test_regression_parallel_failures_of_the_cache_are_given_up_once() -> None:
    """Each of the jobs in flight doubled the hold: 32 of them made five seconds five minutes."""
    for kind in (FailureKind.NO_SPACE, FailureKind.DISK):
        made = driver(count=16)
        for chunk in range(0, 16, 2):
            made.need(A, chunk, chunk + 1)
        for job in list(made.jobs):
            made.fail(job, kind)
        assert gave_up(made) == [(kind, -1, 5.0)]
        assert [score.faults for score in made.planner.scores(A)] == [0]
        assert len(made.woken) == 8


def test_a_hold_is_not_cut_short_by_another() -> None:
    made = driver(count=8)
    made.need(A, 0, 1)
    for _ in range(3):
        made.undone(A, 0, FailureKind.NO_SPACE)
    made.durable(A)
    made.undone(A, 0, FailureKind.NO_SPACE)  # 5 s again: something was kept
    assert [until for _, _, until in gave_up(made)] == [5.0, 10.0, 20.0, 20.0]
    made.sleep(19.0)
    assert made.planner.failure(A) is not None
    made.sleep(1.0)
    assert made.planner.failure(A) is None


def test_a_timer_of_what_was_forgiven_or_removed_means_nothing() -> None:
    made = driver(count=2)
    made.need(A, 0, 1)
    made.mismatch(1)
    made.mismatch(2)
    made.remirror(A, ())
    made.sleep_until_alarm()
    assert made.planner.failure(A) is None
    made.need(A, 0, 1)
    made.mismatch(max(made.jobs))
    made.mismatch(max(made.jobs))
    made.remove(A)
    made.sleep_until_alarm()
    assert made.alarm == float("inf")


def test_parallel_permanent_failures_are_one() -> None:
    made = driver()
    made.need(A, 0, 1)
    made.need(A, 4, 5)
    for job in list(made.jobs):
        made.fail(job, FailureKind.AUTH)
    assert gave_up(made) == [(FailureKind.AUTH, -1, 5.0)]


def test_a_blob_without_mirrors_is_given_up() -> None:
    made = PlanDriver()
    made.add(A, BlobShape(MIB, MIB), ())
    reader = made.need(A, 0, 1)
    assert made.woken[reader] is not None
    made.remirror(A, mirrors("one"))  # and past faults are forgotten
    second = made.need(A, 0, 1)
    made.land(only(made))
    assert made.woken[second] is None


def test_fill_takes_up_again_when_a_hold_ends() -> None:
    made = driver(count=2)
    made.fill(A)
    made.fail(only(made), FailureKind.AUTH)
    assert not made.jobs
    made.finish({A: 0}, others=FailureKind.RESET)


# ---- wrong bytes


def test_a_wrong_chunk_is_fetched_elsewhere() -> None:
    made = driver("one", "two", "three", count=1)
    reader = made.need(A, 0, 1)
    made.mismatch(1)
    made.mismatch(2)
    made.land(3)
    assert sorted(asked(made)) == [0, 1, 2]
    assert made.woken == {reader: None}


def test_a_refuted_chunk_is_asked_of_another_mirror_if_there_is_one() -> None:
    made = driver("one", "two", count=2)
    made.refute(A, {0: 0, 1: 1})
    made.need(A, 0, 1)
    made.need(A, 1, 2)
    assert asked(made) == [1, 0]
    alone = driver("one", count=1)
    alone.refute(A, {0: 0})
    reader = alone.need(A, 0, 1)
    alone.land(only(alone))
    assert alone.woken == {reader: None}


def test_mismatches_per_mirror_hold_the_chunk_alone() -> None:
    made = driver("one", "two", count=4)
    reader = made.need(A, 0, 1)
    for _ in range(4):  # twice from each
        assert not made.woken
        made.mismatch(max(made.jobs))
    assert sorted(asked(made)) == [0, 0, 1, 1]
    assert gave_up(made) == [(FailureKind.MISMATCH, 0, 5.0)]
    assert made.woken[reader] is not None
    for job in list(made.jobs):
        made.done(job)
    again = made.need(A, 0, 2)
    assert made.woken[again] is not None
    assert not made.jobs
    other = made.need(A, 1, 4)  # the rest stays readable
    run = only(made)
    for _ in range(3):
        made.land(run, durable=True)
    assert made.woken[other] is None
    failure = made.planner.stuck(A)
    assert failure is not None
    assert (failure.kind, failure.chunk) == (FailureKind.MISMATCH, 0)
    made.done(run)
    made.fill(A)
    made.sleep_until_alarm()
    assert made.jobs  # tried again after the hold


def test_a_job_goes_on_after_a_wrong_chunk() -> None:
    made = driver("one", "two", count=4)
    reader = made.need(A, 0, 4)
    made.mismatch(1)
    assert made.jobs[1].todo == [1, 2, 3]
    for _ in range(3):
        made.land(1)
    made.land(2)
    assert made.woken == {reader: None}


def test_a_request_ends_before_a_chunk_for_which_the_mirror_is_avoided() -> None:
    made = driver("one", "two", count=4)
    reader = made.need(A, 2, 3)
    made.mismatch(1)
    made.withdraw(reader)
    made.fail(2, FailureKind.BUSY, retry_after=3.0)
    made.done(1)
    made.need(A, 0, 4)
    fetches = [command for command in made.commands if isinstance(command, plan.Fetch)]
    assert [(fetch.mirror, fetch.span.start, fetch.span.stop) for fetch in fetches[2:]] == [
        (fetches[0].mirror, 0, 2),
        (fetches[0].mirror, 3, 4),
    ]


def test_a_chunk_for_which_no_mirror_is_left_is_held_with_the_reason() -> None:
    made = driver("one", "two", count=2)
    reader = made.need(A, 0, 1)
    made.mismatch(1)
    made.mismatch(2)
    made.mismatch(max(made.jobs))  # the one that was asked again is bad now
    made.fail(max(made.jobs), FailureKind.AUTH)
    failure = made.woken[reader]
    assert failure is not None
    assert (failure.kind, failure.chunk) == (FailureKind.AUTH, 0)


def test_regression_a_mirror_that_gave_wrong_bytes_is_asked_again_while_the_other_fails_for_ever() -> None:
    """It was avoided for that chunk for ever, as long as another mirror lived, however dead that one was."""
    made = driver("one", "two", count=1)
    reader = made.need(A, 0, 1)
    honest = asked(made)[0]
    made.mismatch(1)
    made.done(1)
    made.finish({A: honest}, others=FailureKind.CONNECT)
    assert made.woken[reader] is None


# ---- broken answers


def test_protocol_strikes_in_a_row_bury_a_mirror() -> None:
    made = driver()
    reader = made.need(A, 0, 2)
    for _ in range(2):
        made.fail(only(made), FailureKind.PROTOCOL)
        made.sleep_until_alarm()
    made.land(only(made))  # not in a row
    for _ in range(2):
        made.fail(only(made), FailureKind.PROTOCOL)
        made.sleep_until_alarm()
    assert not made.woken
    made.fail(only(made), FailureKind.PROTOCOL)
    assert made.woken[reader] is not None
    assert gave_up(made)[0][0] is FailureKind.PROTOCOL


def test_regression_parallel_broken_answers_are_one_strike() -> None:
    """Three jobs in flight behind a captive portal were three strikes: EIO at once for what passes in a second."""
    made = driver(count=8)
    for chunk in range(0, 8, 2):
        made.need(A, chunk, chunk + 1)
    for job in list(made.jobs):
        made.fail(job, FailureKind.PROTOCOL)
    assert not made.woken


# ---- workers


def test_a_dead_worker_is_not_the_mirrors_fault_and_is_tried_at_once() -> None:
    made = driver(count=8)
    made.need(A, 0, 1)
    made.need(A, 4, 5)
    for job in list(made.jobs):
        made.fail(job, FailureKind.WORKER)
    assert len(made.jobs) == 2
    assert [score.faults for score in made.planner.scores(A)] == [0]


def test_workers_that_die_again_and_again_are_given_a_pause() -> None:
    made = driver("one", "two", max_retries=2)
    reader = made.need(A, 0, 1)
    made.fail(only(made), FailureKind.WORKER)
    assert sorted(asked(made)) == [0, 1]  # its answers may have killed it
    made.fail(only(made), FailureKind.WORKER)
    assert not made.jobs
    made.sleep_until_alarm()
    made.fail(only(made), FailureKind.WORKER)
    failure = made.woken[reader]
    assert failure is not None
    assert failure.kind is FailureKind.WORKER


def test_without_retries_the_first_death_is_told() -> None:
    made = driver(max_retries=0)
    reader = made.need(A, 0, 1)
    made.fail(only(made), FailureKind.WORKER)
    assert made.woken[reader] is not None


@pytest.mark.parametrize("end", ["done", "cancelled"])
def test_a_job_that_ends_for_no_reason_does_not_spin(end: str) -> None:
    made = driver()
    reader = made.need(A, 0, 1)
    if end == "done":
        made.done(only(made))
    else:
        made.fail(only(made), FailureKind.CANCELLED)
    assert not made.jobs
    assert made.alarm == 0.5
    made.sleep_until_alarm()
    made.land(only(made))
    assert made.woken == {reader: None}


# ---- origins without ranges


def test_an_origin_without_ranges_is_read_as_one_stream_of_what_is_absent() -> None:
    made = PlanDriver(Limits(unsettled_bytes=2 * MIB, job_bytes=2 * MIB))
    made.add(A, BlobShape(6 * MIB, MIB), mirrors("one"), present=[1])
    reader = made.need(A, 4, 5)
    made.fail(only(made), FailureKind.NO_RANGES)
    stream = made.jobs[only(made)]
    assert stream.fetch.whole
    assert stream.todo == [0, 2, 3, 4, 5]
    made.need(A, 5, 6)  # in the stream: nothing to trim
    made.add(B, BlobShape(MIB, MIB), mirrors("two"))
    made.fill(B)  # its bytes are not counted against the budget of others
    assert len(made.jobs) == 2
    while made.jobs[2].todo:
        made.land(2)
    made.done(2)
    assert made.woken[reader] is None


def test_a_stream_waits_until_nothing_else_is_in_flight_and_background_gives_way_to_it() -> None:
    made = driver("one", background_jobs=2, first_job_bytes=1)
    made.fill(A)
    made.need(A, 6, 7)
    for job in list(made.jobs)[1:]:
        made.fail(job, FailureKind.NO_RANGES)
    made.want(A, 3, 4)
    assert list(made.jobs) == [1]
    made.land(1)
    made.done(1)
    (stream,) = made.jobs.values()
    assert stream.fetch.whole
    assert stream.fetch.priority is Priority.DEMAND


def test_regression_a_stream_for_fill_does_not_take_demands_slot() -> None:
    """Whole streams looked at max_jobs alone."""
    made = driver(max_jobs=4, background_jobs=1)
    made.fill(A)
    made.fail(only(made), FailureKind.NO_RANGES)
    made.add(B, BlobShape(4 * MIB, MIB), mirrors("two"))
    made.fill(B)  # PlanDriver asserts the slots
    assert len(made.jobs) == 1


def test_regression_a_mirror_without_ranges_has_its_turn_when_the_others_fail() -> None:
    """While any mirror had ranges it was never asked, although it was the only one that answered."""
    made = driver("one", "two", count=2)
    reader = made.need(A, 0, 1)
    streamer = asked(made)[0]
    made.fail(only(made), FailureKind.NO_RANGES)
    made.fail(only(made), FailureKind.CONNECT)
    made.sleep_until_alarm()  # one failure is not enough: a stream blocks everything else
    made.fail(only(made), FailureKind.CONNECT)
    stream = made.jobs[only(made)]
    assert stream.fetch.whole
    assert stream.fetch.mirror == streamer
    made.land(only(made))
    assert made.woken == {reader: None}


def test_a_stream_leaves_out_chunks_for_which_its_mirror_is_avoided() -> None:
    made = driver("one", "two", count=3)
    first = made.need(A, 0, 3)
    made.fail(1, FailureKind.NO_RANGES)
    made.fail(2, FailureKind.CONNECT)
    made.sleep_until_alarm()
    made.fail(3, FailureKind.CONNECT)
    assert made.jobs[4].todo == [0, 1, 2]
    made.mismatch(4)
    made.withdraw(first)
    made.need(A, 1, 3)
    made.fail(5, FailureKind.CONNECT)  # the other mirror, for the wrong chunk
    made.fail(4, FailureKind.RESET)
    made.sleep_until_alarm()
    made.fail(6, FailureKind.CONNECT)
    stream = made.jobs[only(made)]
    assert stream.fetch.whole
    assert stream.todo == [1, 2]


def test_fill_from_a_mirror_with_ranges_gives_way_to_a_reader_who_needs_a_stream() -> None:
    made = driver("one", "two", count=12, background_jobs=2, fill_jobs_under_demand=2, first_job_bytes=1)
    made.need(A, 11, 12)
    made.fail(1, FailureKind.NO_RANGES)
    made.land(2, durable=True)
    made.done(2)
    reader = made.need(A, 10, 11)
    made.fill(A)
    made.mismatch(3)  # left for this chunk: the mirror without ranges
    made.done(3)
    fills = list(made.jobs)
    assert len(fills) == 2
    for job in fills:
        made.land(job, durable=True)
        made.done(job)
    stream = made.jobs[only(made)]
    assert stream.fetch.whole
    while stream.todo:
        made.land(only(made))
    assert made.woken[reader] is None


def test_a_stream_that_answers_no_ranges_again_breaks_the_protocol() -> None:
    made = driver()
    reader = made.need(A, 0, 1)
    made.fail(only(made), FailureKind.NO_RANGES)
    for _ in range(2):
        made.fail(only(made), FailureKind.NO_RANGES)
        made.sleep_until_alarm()
    made.fail(only(made), FailureKind.NO_RANGES)
    failure = made.woken[reader]
    assert failure is not None
    assert failure.kind is FailureKind.NO_RANGES


# ---- new mirrors


def test_new_mirrors_are_appended_and_past_faults_forgotten() -> None:
    made = driver("one", count=2)
    made.need(A, 0, 1)
    made.mismatch(1)
    made.mismatch(2)
    assert made.planner.failure(A) is not None
    made.remirror(A, ())
    assert made.planner.failure(A) is None
    made.feed(plan.Remirrored(A, (*mirrors("one"), Mirror("http://new/x", 1))))
    assert [score.url for score in made.planner.scores(A)] == ["http://one/x", "http://new/x"]
    made.blobs[A].mirror_count = 2
    made.finish({A: 1}, others=FailureKind.CONNECT)


def test_a_known_mirror_is_replaced_in_its_place() -> None:
    """Regression: only URLs were compared, so a new priority (or validator) was never heard of."""
    made = driver("one", "two")
    renewed = Mirror("http://one/x", 9, '"new"')
    made.feed(plan.Remirrored(A, (*mirrors("two"), renewed)))
    assert [(score.url, score.priority) for score in made.planner.scores(A)] == [
        ("http://one/x", 9),
        ("http://two/x", 1),
    ]
    made.need(A, 0, 1)
    assert made.jobs[only(made)].fetch.mirror == 1


# ---- an honest mirror


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 12), places=st.integers(1, 3), ranges=st.booleans())
def test_while_one_mirror_is_honest_and_faults_are_transient_no_reader_is_told_a_failure(
    data: st.DataObject, count: int, places: int, ranges: bool
) -> None:
    made = PlanDriver(Limits(max_jobs=3, background_jobs=2, job_bytes=2 * MIB))
    made.add(A, BlobShape(count * MIB, MIB), mirrors(*"abc"[:places]))
    for start in data.draw(st.lists(st.integers(0, count - 1), max_size=5)):
        made.need(A, start, count)
    honest = data.draw(st.integers(0, places - 1))
    transient = [kind for kind in FailureKind if not is_permanent(kind)]
    told = (FailureKind.NO_RANGES, FailureKind.NO_SPACE, FailureKind.PROTOCOL)
    made.finish(
        {A: honest},
        ranges=ranges,
        others=data.draw(st.sampled_from([kind for kind in transient if kind not in told])),
    )
    assert set(made.woken.values()) <= {None}
    assert made.blobs[A].present.full

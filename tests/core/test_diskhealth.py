"""When a disk is unstable, bypassed and healthy again, against a plain record of everything that happened."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.diskhealth import DiskHealth, Health, HealthRules

RULES = HealthRules()
# What happens next, and how many seconds after what happened before: a fault, a trial that fails, one that is well.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fault", "bad", "good"]), st.sampled_from([0.0, 0.5, 1.0, 5.0, 25.0, 61.0, 700.0])
    ),
    max_size=60,
)


def at(*times: float) -> DiskHealth:
    """A disk that failed at these times."""
    disk = DiskHealth()
    for time in times:
        disk.fault(time, "EIO")
    return disk


def test_one_error_makes_it_unstable_and_has_it_tried() -> None:
    disk = DiskHealth()
    assert disk.next_trial == math.inf
    assert disk.fault(100.0, "EIO")
    assert (disk.state, disk.text, disk.next_trial) == (Health.UNSTABLE, "EIO", 105.0)


def test_errors_of_one_moment_are_one() -> None:
    assert at(0.0, 0.1, 0.2, 0.3, 0.9).state is Health.UNSTABLE


def test_repeated_errors_bypass_it_and_old_ones_do_not_count() -> None:
    assert at(0.0, 10.0, 20.0).state is Health.BYPASSED
    assert at(0.0, 10.0, 60.5).state is Health.UNSTABLE


def test_a_disk_that_goes_on_failing_within_the_merge_time_is_bypassed_all_the_same() -> None:
    assert at(*(number * 0.25 for number in range(13))).state is Health.BYPASSED


def test_failed_trials_bypass_a_disk_that_nobody_else_uses() -> None:
    disk = at(0.0)
    assert not disk.tried(5.0, "EROFS")
    assert disk.tried(10.0, "EROFS")
    assert (disk.state, disk.text) == (Health.BYPASSED, "EROFS")


def test_a_trial_that_could_not_be_made_says_nothing_and_is_made_later() -> None:
    disk = at(0.0)
    for time in (5.0, 10.0, 15.0, 20.0):
        disk.skipped(time)
        assert (disk.state, disk.text, disk.next_trial) == (Health.UNSTABLE, "EIO", time + 5.0)
    well = DiskHealth()
    well.skipped(0.0)
    assert (well.state, well.next_trial) == (Health.HEALTHY, math.inf)


def test_it_comes_back_after_trials_that_went_well_and_a_calm() -> None:
    disk = at(0.0, 2.0, 4.0)
    assert not disk.tried(5.0)
    assert not disk.tried(10.0)  # two, and not calm yet
    assert not disk.tried(12.0, "EIO")
    assert not disk.tried(23.0)  # calm, and only one in a row
    assert disk.tried(28.0)
    assert (disk.state, disk.text, disk.next_trial) == (Health.HEALTHY, "", math.inf)
    assert not disk.tried(30.0, "a trial that was begun before")
    assert disk.state is Health.HEALTHY


def test_a_relapse_is_believed_later_and_forgotten_in_time() -> None:
    disk, now, calms = DiskHealth(), 0.0, []
    for _ in range(9):
        for _ in range(RULES.errors):
            now += 2
            disk.fault(now, "EIO")
        calms.append(disk.calm)
        while disk.state is not Health.HEALTHY:
            now += RULES.pause
            disk.tried(now)
    assert calms == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0, 600.0]
    now += RULES.memory
    for _ in range(RULES.errors):
        now += 2
        disk.fault(now, "EIO")
    assert disk.calm == RULES.calm


@given(STEPS)
def test_it_agrees_with_the_record_of_all_that_happened(steps: list[tuple[str, float]]) -> None:
    disk, now = DiskHealth(), 1000.0
    errors: list[float] = []  # each one, in order
    counted: list[float] = []  # since it was healthy last, one for each trouble
    good = 0
    for what, pause in steps:
        now += pause
        before, bypassed = disk.state, disk.state is Health.BYPASSED
        if what == "fault" or (what == "bad" and before is not Health.HEALTHY):
            errors.append(now)
            if not counted or now - counted[-1] >= RULES.merge:
                counted.append(now)
            good = 0
        elif what == "good" and before is not Health.HEALTHY:
            good += 1
        changed = disk.fault(now, "e") if what == "fault" else disk.tried(now, "e" if what == "bad" else "")
        assert changed is (disk.state is not before)
        recent = [time for time in counted if time > now - RULES.window]
        match disk.state:
            case Health.HEALTHY:
                if before is not Health.HEALTHY:
                    assert good >= RULES.trials
                    assert now - errors[-1] >= RULES.calm
                counted, good = [], 0
            case Health.UNSTABLE:
                assert counted
                assert len(recent) < RULES.errors
            case Health.BYPASSED:
                assert bypassed or len(recent) >= RULES.errors
        assert (disk.next_trial < math.inf) is (disk.state is not Health.HEALTHY)
        assert disk.next_trial == math.inf or disk.next_trial <= now + RULES.pause
        assert RULES.calm <= disk.calm <= RULES.longest_calm


@given(st.floats(0, 1e6), st.integers(0, 20))
def test_a_disk_that_is_well_again_always_comes_back(start: float, more: int) -> None:
    """However long it failed: after the longest calm, and trials that go well, it is used."""
    disk, now = DiskHealth(), start
    for _ in range(RULES.errors + more):
        now += 3
        disk.fault(now, "EIO")
    well = now
    while disk.state is not Health.HEALTHY:
        now = disk.next_trial
        disk.tried(now)
        assert now <= well + RULES.longest_calm + RULES.trials * RULES.pause

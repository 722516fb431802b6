"""What landed and could not be kept: the blob is held, instead of fetching the same bytes again and again."""

from __future__ import annotations

from weightfs.core import plan
from weightfs.core.geometry import MIB, BlobShape
from weightfs.core.plan import Failure
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

BLOB = blob_id(1)
FULL = Failure(FailureKind.NO_SPACE, "the cache is full")


def landed(driver: PlanDriver, count: int) -> None:
    for _ in range(count):
        driver.land(next(job for job, model in driver.jobs.items() if model.todo))


def refuse(driver: PlanDriver, nbytes: int) -> float:
    """The cache refuses `nbytes`; how long the blob is held."""
    driver.blobs[BLOB].undurable -= nbytes
    commands = driver.feed(plan.Undone(BLOB, nbytes, FULL))
    gave_up = next(command for command in commands if isinstance(command, plan.GaveUp))
    assert gave_up.failure.kind is FailureKind.NO_SPACE
    return gave_up.until - driver.now


def test_a_refused_commit_holds_the_blob_and_wakes_its_waiters() -> None:
    driver = PlanDriver()
    driver.add(BLOB, BlobShape(8 * MIB, MIB), mirrors("a"))
    waiter = driver.need(BLOB, 0, 2)
    landed(driver, 1)
    assert refuse(driver, MIB) == driver.limits.hold_base
    assert driver.woken[waiter] == FULL
    assert driver.planner.failure(BLOB) == FULL
    later = driver.need(BLOB, 3, 4)
    assert driver.woken[later] == FULL


def test_holds_grow_although_chunks_land_until_something_is_durable() -> None:
    driver = PlanDriver()
    driver.add(BLOB, BlobShape(8 * MIB, MIB), mirrors("a"))
    held = []
    for chunk in (0, 1, 2):
        driver.need(BLOB, chunk, chunk + 1)
        landed(driver, 1)
        held.append(refuse(driver, MIB))
        driver.now += held[-1]
        driver.feed(plan.Tick())
    base = driver.limits.hold_base
    assert held == [base, 2 * base, 4 * base]
    driver.need(BLOB, 3, 4)
    landed(driver, 1)
    driver.durable(BLOB)
    assert refuse(driver, 0) == base


def test_what_was_dropped_before_it_was_durable_holds_nothing() -> None:
    driver = PlanDriver()
    driver.add(BLOB, BlobShape(2 * MIB, MIB), mirrors("a"))
    driver.need(BLOB, 0, 1)
    landed(driver, 1)
    driver.feed(plan.Undone(BLOB, MIB))
    driver.blobs[BLOB].undurable = 0
    assert driver.planner.failure(BLOB) is None
    driver.feed(plan.Undone(blob_id(9), MIB, FULL))  # of a blob that was removed meanwhile

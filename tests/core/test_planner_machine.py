"""Anything may happen in any order, and the planner's invariants hold; then one mirror is honest, and all completes.

`PlanDriver` holds the invariants after every event (see there). `teardown` is the proof of liveness: it runs from
whatever state the generated rules have led to.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightfs.core.geometry import MIB, BlobShape, ChunkSpan
from weightfs.core.plan import Limits
from weightfs.core.planword import ChunkState
from weightfs.core.retry import is_permanent
from weightfs.errors import FailureKind
from weightfs.testing.planning import PlanDriver, blob_id, mirrors

LIMITS = Limits(
    max_jobs=5,
    background_jobs=3,
    fill_jobs_under_demand=1,
    job_bytes=4 * MIB,
    unsettled_bytes=6 * MIB,
    background_unsettled_bytes=5 * MIB,
    budget_bytes=8 * MIB,
    first_job_bytes=3 * MIB,
)
RETRYING = [
    kind
    for kind in FailureKind
    if not is_permanent(kind)
    and kind not in (FailureKind.NO_RANGES, FailureKind.NO_SPACE, FailureKind.PROTOCOL)
]
RETRY_AFTERS = st.sampled_from([None, None, None, 0.0, 7.0, 1e9])
JITTERS = st.sampled_from([0.0, 0.3, 0.999])


class PlannerMachine(RuleBasedStateMachine):
    """Blobs 0 to 2 come and go; each has up to three mirrors (and more by `remirror`)."""

    driver: PlanDriver

    @initialize(max_retries=st.sampled_from([None, None, 0, 2]))
    def start(self, max_retries: int | None) -> None:
        self.driver = PlanDriver(
            Limits(
                **{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | {"max_retries": max_retries}
            )
        )

    @invariant()
    def who_waits_is_told_for_what(self) -> None:
        for blob, span in self.driver.waiting.values():
            words = self.driver.planner.words(blob.id, span, self.driver.now)
            states = [word.state for word in words if word.waiters]
            assert states, "nobody waits for anything in the span of a waiter"
            assert not {ChunkState.PRESENT, ChunkState.UNASKED} & set(states)

    def a_blob(self, data: Any) -> Any:
        return data.draw(st.sampled_from(list(self.driver.blobs.values())))

    def a_span(self, data: Any, shape: BlobShape) -> ChunkSpan:
        start = data.draw(st.integers(0, shape.chunk_count - 1))
        return ChunkSpan(start, min(shape.chunk_count, start + data.draw(st.integers(1, 5))))

    def a_job(self, data: Any, **how: bool) -> int:
        return int(data.draw(st.sampled_from(self.jobs(**how))))

    def jobs(self, *, todo: bool = False, trim: bool = False) -> list[int]:
        found = self.driver.jobs.items()
        return [n for n, job in found if (job.todo or not todo) and (job.trim is not None or not trim)]

    # ---- blobs

    @precondition(lambda self: len(self.driver.blobs) < 3)
    @rule(data=st.data(), number=st.integers(0, 2), count=st.integers(1, 12), odd=st.integers(1, MIB))
    def add(self, data: Any, number: int, count: int, odd: int) -> None:
        if blob_id(number) not in self.driver.blobs:
            places = mirrors(*["a", "b", "c"][: data.draw(st.integers(1, 3))])
            present = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
            kept = data.draw(st.sets(st.integers(0, count - 1), max_size=2))
            shape = BlobShape((count - 1) * MIB + odd, MIB)
            self.driver.add(blob_id(number), shape, places, present, kept)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        self.driver.remove(self.a_blob(data).id)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), new=st.booleans())
    def remirror(self, data: Any, new: bool) -> None:
        blob = self.a_blob(data)
        if blob.mirror_count < 4:
            self.driver.remirror(blob.id, mirrors(f"new{blob.mirror_count}") if new else ())

    # ---- what is wanted

    @precondition(lambda self: self.driver.blobs and len(self.driver.waiting) < 12)
    @rule(data=st.data())
    def need(self, data: Any) -> None:
        blob = self.a_blob(data)
        span = self.a_span(data, blob.shape)
        self.driver.need(blob.id, span.start, span.stop)

    @precondition(lambda self: self.driver.waiting)
    @rule(data=st.data())
    def withdraw(self, data: Any) -> None:
        self.driver.withdraw(data.draw(st.sampled_from(list(self.driver.waiting))))

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data())
    def want(self, data: Any) -> None:
        blob = self.a_blob(data)
        span = self.a_span(data, blob.shape)
        self.driver.want(blob.id, span.start, span.stop)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), on=st.sampled_from([True, True, True, False]))
    def fill(self, data: Any, on: bool) -> None:
        self.driver.fill(self.a_blob(data).id, on=on)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), on=st.booleans())
    def pause(self, data: Any, on: bool) -> None:
        self.driver.pause(self.a_blob(data).id, on=on)

    # ---- what jobs say

    @precondition(lambda self: self.jobs(todo=True))
    @rule(data=st.data(), durable=st.booleans())
    def land(self, data: Any, durable: bool) -> None:
        self.driver.land(self.a_job(data, todo=True), durable=durable)

    @precondition(lambda self: self.jobs(todo=True))
    @rule(data=st.data())
    def mismatch(self, data: Any) -> None:
        self.driver.mismatch(self.a_job(data, todo=True))

    @precondition(lambda self: self.jobs(trim=True))
    @rule(data=st.data(), late=st.integers(0, 2))
    def trimmed(self, data: Any, late: int) -> None:
        self.driver.trimmed(self.a_job(data, trim=True), late=late)

    @precondition(lambda self: self.driver.jobs)
    @rule(data=st.data())
    def done(self, data: Any) -> None:
        self.driver.done(self.a_job(data))

    @precondition(lambda self: self.driver.jobs)
    @rule(data=st.data(), kind=st.sampled_from(FailureKind), retry_after=RETRY_AFTERS, jitter=JITTERS)
    def fail(self, data: Any, kind: FailureKind, retry_after: float | None, jitter: float) -> None:
        self.driver.fail(self.a_job(data), kind, retry_after=retry_after, jitter=jitter)

    # ---- disk and time

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), part=st.integers(1, 3))
    def durable(self, data: Any, part: int) -> None:
        blob = self.a_blob(data)
        self.driver.durable(blob.id, blob.undurable // part)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), part=st.integers(1, 3), refused=st.booleans())
    def undone(self, data: Any, part: int, refused: bool) -> None:
        blob = self.a_blob(data)
        self.driver.undone(blob.id, blob.undurable // part, FailureKind.NO_SPACE if refused else None)

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        blob = self.a_blob(data)
        self.driver.drop(blob.id, self.a_span(data, blob.shape))

    @precondition(lambda self: self.driver.blobs)
    @rule(data=st.data(), freed=st.booleans())
    def punch(self, data: Any, freed: bool) -> None:
        self.driver.punch(self.a_blob(data).id, freed=freed)

    @rule(demand=st.none() | st.integers(0, 20), margin=st.integers(0, 4))
    def limit(self, demand: int | None, margin: int) -> None:
        if demand is None:
            self.driver.limit(None, None)
        else:
            self.driver.limit(demand * MIB, max(0, demand - margin) * MIB)

    @rule(on=st.booleans())
    def background(self, on: bool) -> None:
        self.driver.set_background(on=on)

    @rule()
    def no_room(self) -> None:
        self.driver.no_room()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 6.0, 400.0]))
    def sleep(self, seconds: float) -> None:
        self.driver.sleep(seconds)

    # ---- in the end

    def teardown(self) -> None:
        driver = getattr(self, "driver", None)
        if driver is None:
            return
        turn = len(driver.commands)  # as good as random, and the same when an example is replayed
        honest = {blob.id: turn % blob.mirror_count for blob in driver.blobs.values()}
        driver.finish(honest, ranges=turn % 3 > 0, others=RETRYING[turn % len(RETRYING)])
        assert driver.planner.idle()
        assert driver.alarm > driver.now or driver.alarm == float("inf")


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)

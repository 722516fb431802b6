"""A request whose work never ends is told of once, and answered: also when the work sits in a thread."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import trio
import trio.testing
from pyfuse3 import FileHandleT, FUSEError, InodeT, RequestContext

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.core.overdue import FOREVER, MARGIN, METADATA, Bound
from weightfs.errors import FailureKind, ReadError
from weightfs.layouts.models import ModelsLayout
from weightfs.mount import requests, watchdog
from weightfs.mount.inodes import ROOT
from weightfs.mount.ops import WeightOperations
from weightfs.mount.requests import OverdueError
from weightfs.mount.serve import bounds_of
from weightfs.mount.session import MountOptions
from weightfs.mount.stats import MountStats
from weightfs.mount.trees import Trees
from weightfs.mount.watchdog import LOOK_EVERY, TELL_AT_MOST, Watchdog
from weightfs.testing.fake_engine import FakeEngine, pattern

BOUND = 100.0  # the engine's; never kept by a read that hangs


class ThreadEngine(FakeEngine):
    """Reads of `stuck` sit in a thread that nobody can cancel, until `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.inside = threading.Semaphore(0)
        self.entered = 0

    async def read(self, id: BlobId, span: ByteSpan) -> bytes:  # noqa: A002 - the contract's name
        if self._by_id[id].name != "stuck":
            return await super().read(id, span)
        self.entered += 1
        await trio.to_thread.run_sync(self.hang)
        return await super().read(id, span)

    def hang(self) -> None:
        self.inside.release()
        self.release.wait()

    async def hangs(self) -> None:
        """Return when one more read sits in its thread."""
        await trio.testing.wait_all_tasks_blocked()
        assert self.inside.acquire(timeout=60)


class Caller:
    """In the place of pyfuse3's context."""

    uid = gid = umask = 0
    pid = 4711


class Stage:
    """Handlers without a kernel, and the watchdog beside them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        engine: FakeEngine,
        *,
        read_timeout: float = BOUND,
        settled: Callable[[], object] = trio.lowlevel.checkpoint,
    ) -> None:
        self.engine, self.stats, self.nursery = engine, MountStats(), nursery
        engine.add([("stuck", 5000), ("well", 5000)])
        self.tree = Trees(engine, [ModelsLayout()]).make()
        self.handlers = WeightOperations(
            engine,
            self.tree,
            self.stats,
            lambda: None,
            settled=settled,  # type: ignore[arg-type]
        )
        self.answers: list[tuple[str, object]] = []
        engine.read_timeout = read_timeout
        bounds = partial(bounds_of, engine, MountOptions())
        self.dog = Watchdog(self.stats.requests, bounds, engine.explain)
        nursery.start_soon(self.dog.run)

    def inode(self, name: str) -> int:
        inode = ROOT
        for part in ("models", "https", "fake.example", name):
            node = self.tree.lookup(inode, part)
            assert node is not None
            inode = node.ino
        return inode

    async def read(self, name: str) -> None:
        await self.ask(name, partial(self.handlers.read, FileHandleT(self.inode(name)), 0, 5000))

    async def ask(self, name: str, question: Callable[[], object]) -> None:
        try:
            self.answers.append((name, await question()))  # type: ignore[misc]
        except FUSEError as error:
            self.answers.append((name, error.errno))

    def check(self) -> None:
        """Nothing is left, and nothing was unforeseen."""
        assert not list(self.stats.requests)
        assert not self.stats.requests.shelter.left_behind
        assert self.stats.internal_errors == 0
        assert self.engine.waiting == 0


@contextlib.asynccontextmanager
async def staged(engine: FakeEngine, **kwargs: object) -> AsyncIterator[Stage]:
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery, engine, **kwargs)  # type: ignore[arg-type]  # passed on
        yield stage
        stage.check()
        nursery.cancel_scope.cancel()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == watchdog.__name__]


async def test_a_read_that_never_ends_is_told_once_and_answered(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(BOUND + MARGIN - 1)
        assert not stage.answers
        assert not told(caplog)
        await stage.read("well")
        await trio.sleep(3 * LOOK_EVERY)
        assert stage.answers == [("well", pattern("well", 0, 5000)), ("stuck", errno.EIO)]
        (line,) = told(caplog)
        for words in (
            "A read is overdue",
            "bytes [0, 5000)",
            "the bound is 2m10s",
            "it gets EIO",
            "stuck from byte 0 on, 1 readers wait",
            "fake_engine.py:",
        ):
            assert words in line
        assert stage.stats.failed_reads == 1


async def test_a_read_in_a_thread_that_nobody_can_cancel_is_answered_and_its_thread_is_told(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ThreadEngine()
    try:
        async with staged(engine) as stage:
            shelter = stage.stats.requests.shelter
            stage.nursery.start_soon(stage.read, "stuck")
            await engine.hangs()
            stage.dog.look(trio.current_time() + BOUND + MARGIN + 1)
            await trio.testing.wait_all_tasks_blocked()
            assert not stage.answers, "a failing answer is held for a second"
            assert len(shelter.left_behind) == 1
            mock_clock.jump(2)
            await trio.testing.wait_all_tasks_blocked()
            assert stage.answers == [("stuck", errno.EIO)]
            (line,) = told(caplog)
            assert "its thread is at" in line
            assert "ThreadEngine.hang" in line
            engine.release.set()
            await shelter.drained()
    finally:
        engine.release.set()


async def test_the_end_waits_for_a_thread_that_hangs_and_says_so(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ThreadEngine()
    handler = trio.CancelScope()
    drained = trio.Event()
    try:
        async with staged(engine) as stage:
            shelter = stage.stats.requests.shelter

            async def read() -> None:
                with handler:
                    await stage.read("stuck")

            async def drain() -> None:
                await shelter.drained()
                drained.set()

            stage.nursery.start_soon(read)
            await engine.hangs()
            handler.cancel()  # as the mount's end does it
            await trio.testing.wait_all_tasks_blocked()
            assert not list(stage.stats.requests)
            assert len(shelter.left_behind) == 1
            stage.nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(requests.DRAIN_SECONDS + 1)
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
            assert "The end waits for 1 threads" in caplog.text
            engine.release.set()
            await drained.wait()
    finally:
        engine.release.set()


async def test_works_that_hang_are_bounded_and_then_who_would_wait_fails_at_once(
    mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LEFT_AT_MOST", 2)
    engine = ThreadEngine()
    try:
        async with staged(engine) as stage:
            for _ in range(2):
                stage.nursery.start_soon(stage.read, "stuck")
                await engine.hangs()
                stage.dog.look(trio.current_time() + BOUND + MARGIN + 1)
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(20)  # beyond penance
                await trio.testing.wait_all_tasks_blocked()
            stage.nursery.start_soon(stage.read, "well")
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(20)
            await trio.testing.wait_all_tasks_blocked()
            assert stage.answers == [("stuck", errno.EIO), ("stuck", errno.EIO), ("well", errno.EIO)]
            context: RequestContext = Caller()  # type: ignore[assignment]
            assert await stage.handlers.opendir(InodeT(ROOT), context) == ROOT  # metadata goes on
            with pytest.raises(FUSEError) as caught:
                await stage.handlers.lookup(InodeT(ROOT), b"none", context)
            assert caught.value.errno == errno.ENOENT
            engine.release.set()
            await stage.stats.requests.shelter.drained()
            await stage.read("well")
            assert stage.answers[-1] == ("well", pattern("well", 0, 5000))
    finally:
        engine.release.set()


async def test_after_the_process_was_stopped_who_has_a_bound_of_his_own_goes_first(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(BOUND + MARGIN + 1)  # as SIGSTOP and SIGCONT do it
        await trio.testing.wait_all_tasks_blocked()
        assert not told(caplog)
        mock_clock.jump(LOOK_EVERY)
        await trio.testing.wait_all_tasks_blocked()
        assert len(told(caplog)) == 1
        mock_clock.jump(2)
        await trio.testing.wait_all_tasks_blocked()
        assert stage.answers == [("stuck", errno.EIO)]


async def test_another_read_timeout_holds_for_reads_that_begin_from_now_on(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(2 * LOOK_EVERY)
        stage.engine.read_timeout = 10 * BOUND
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(BOUND + MARGIN)
        assert stage.answers == [("stuck", errno.EIO)]
        await trio.sleep(9 * BOUND)
        assert len(told(caplog)) == 1
        await trio.sleep(BOUND)
        assert stage.answers == [("stuck", errno.EIO)] * 2


def test_a_lookup_may_ask_its_origin_for_as_long_as_was_configured() -> None:
    engine = FakeEngine()
    browsing = MountOptions(browse=True, browse_timeout=600.0)
    assert bounds_of(engine, browsing).lookup == Bound(600 + MARGIN)
    assert bounds_of(engine, MountOptions(browse_timeout=600.0)).lookup == Bound(METADATA)
    assert bounds_of(engine, browsing).read == Bound(engine.read_timeout + MARGIN)


async def test_a_slow_read_within_its_bound_is_left_alone(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(BOUND + MARGIN - 1)
        stage.engine.let_go("stuck")
        await trio.sleep(3 * LOOK_EVERY)
        assert stage.answers == [("stuck", pattern("stuck", 0, 5000))]
        assert not told(caplog)


async def test_a_read_that_may_wait_for_ever_is_only_told_of(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine(), read_timeout=0.0) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(3 * FOREVER)
        (line,) = told(caplog)
        assert "read-timeout is 0" in line
        assert not stage.answers
        assert [one.overdue for one in stage.stats.requests.status(9)] == [True]
        stage.engine.let_go("stuck")
        await trio.sleep(1)
        assert stage.answers == [("stuck", pattern("stuck", 0, 5000))]


async def test_an_error_of_the_engine_comes_through_as_it_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.fail("well", FailureKind.CHANGED)
        await stage.read("well")
        assert stage.answers == [("well", errno.ESTALE)]


async def test_a_lookup_that_hangs_gets_etimedout_and_names_who_asked(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine(), settled=trio.sleep_forever) as stage:
        context: RequestContext = Caller()  # type: ignore[assignment]
        lookup = partial(stage.handlers.lookup, InodeT(ROOT), b"no such name", context)
        stage.nursery.start_soon(stage.ask, "lookup", lookup)
        await trio.testing.wait_all_tasks_blocked()  # the first
        stage.nursery.start_soon(stage.ask, "opendir", partial(stage.handlers.opendir, InodeT(ROOT), context))
        await trio.sleep(METADATA - 1)
        first, second = stage.stats.requests.status(9)
        assert (first.op, first.name, first.pid, first.inode) == ("lookup", "no such name", 4711, ROOT)
        assert (second.op, second.name, second.offset) == ("opendir", "", None)
        assert first.age == METADATA - 1 == first.waits
        await trio.sleep(2 * LOOK_EVERY)
        assert sorted(stage.answers, key=str) == [("lookup", errno.ETIMEDOUT), ("opendir", errno.ETIMEDOUT)]
        assert [("asked by process 4711" in line, "it gets ETIMEDOUT" in line) for line in told(caplog)] == [
            (True, True)
        ] * 2


async def test_many_that_hang_for_one_reason_are_told_in_few_lines(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        for _ in range(50):
            stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(BOUND + MARGIN + 3 * LOOK_EVERY)
        assert len(told(caplog)) == TELL_AT_MOST + 1
        assert f"{50 - TELL_AT_MOST} more requests" in told(caplog)[-1]
        assert stage.answers == [("stuck", errno.EIO)] * 50
        assert stage.stats.requests.overdue == 50


async def test_a_state_that_cannot_be_told_does_not_keep_the_answer(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_id: BlobId, _span: ByteSpan) -> str:
        raise RuntimeError("broken as well")

    engine = FakeEngine()
    monkeypatch.setattr(engine, "explain", broken)
    async with staged(engine) as stage:
        engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        await trio.sleep(BOUND + MARGIN + 3 * LOOK_EVERY)
        assert stage.answers == [("stuck", errno.EIO)]
        assert "more cannot be told" in caplog.text


async def test_a_look_that_fails_is_told_and_is_not_the_last(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.hold("stuck")
        stage.nursery.start_soon(stage.read, "stuck")
        with monkeypatch.context() as broken:
            broken.setattr(watchdog, "_is_overdue", lambda *_: 1 // 0)
            await trio.sleep(BOUND + MARGIN)
        assert "look failed" in caplog.text
        await trio.sleep(3 * LOOK_EVERY)
        assert stage.answers == [("stuck", errno.EIO)]


async def test_an_answer_that_is_held_back_is_not_overdue(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(FakeEngine()) as stage:
        stage.engine.fail("well", FailureKind.TIMEOUT)
        stage.nursery.start_soon(stage.read, "well")
        await trio.testing.wait_all_tasks_blocked()
        stage.dog.look(trio.current_time() + 10 * BOUND)
        assert not told(caplog)
        assert [one.held for one in stage.stats.requests.status(9)] == [True]
        await trio.sleep(2)
        assert stage.answers == [("well", errno.EIO)]


async def test_what_was_answered_in_time_is_not_given_up_afterwards(
    autojump_clock: trio.testing.MockClock,
) -> None:
    shelter = requests.Shelter()
    one = requests.Request(1, "read", (), 0.0, trio.lowlevel.current_task())
    seen: list[requests.Wait] = []

    async def work() -> int:
        assert one.wait is not None
        seen.append(one.wait)
        return 7

    assert await shelter.run(one, work) == 7
    shelter.give_up(seen[0], "too late")
    assert seen[0].error is None
    assert not shelter.left_behind
    with pytest.raises(ReadError):
        await shelter.run(one, _fails)


async def _fails() -> None:
    await trio.lowlevel.checkpoint()
    raise ReadError("no", kind=FailureKind.DISK)


def test_overdue_is_no_error_of_anybody_else() -> None:
    assert not issubclass(OverdueError, ReadError | OSError)

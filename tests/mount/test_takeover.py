"""Mounts handed from one `serve` to the next, in this process: what fits is taken over, all else begins anew."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from weightfs.layouts.base import Inline, Link
from weightfs.layouts.models import ModelsLayout
from weightfs.mount import ledger, session, takeover
from weightfs.mount.inodes import ROOT, DirNode, Namespace
from weightfs.mount.mounttable import mounts_at, take_away
from weightfs.mount.serve import Mounted, serve
from weightfs.mount.session import MountOptions
from weightfs.testing.fake_engine import FakeEngine, pattern
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import eventually

needs_mount = pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
pytestmark = pytest.mark.mount

SIZE = 5000
# Opens, reads a page, says so; and when it is told to, reads everything again, from us.
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(len(os.pread(fd, 4096, 0)), flush=True)
sys.stdin.readline()
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
sys.stdout.buffer.write(os.pread(fd, 9999, 0))
"""


class FakeKeeper:
    """Keeps descriptors in this process."""

    def __init__(self, *, available: bool = True) -> None:
        self.leaving = False
        self.available = available
        self.kept: tuple[int, int] | None = None
        self.drops = 0

    def inherited(self) -> tuple[int, int] | None:
        return None if self.kept is None else (os.dup(self.kept[0]), os.dup(self.kept[1]))

    def keep(self, fuse: int, ledger: int) -> bool:
        self.kept = os.dup(fuse), os.dup(ledger)
        return True

    def drop(self) -> None:
        self.drops += 1
        for fd in self.kept or ():
            os.close(fd)
        self.kept = None


@pytest.fixture
def keeper() -> Iterator[FakeKeeper]:
    keeper = FakeKeeper()
    yield keeper
    keeper.drop()


def engine(cache: Path | None = None) -> FakeEngine:
    """One file; with `cache` it is complete, and lies there."""
    engine = FakeEngine(cache)
    engine.add([("a", SIZE)], present=float(cache is not None))
    return engine


@asynccontextmanager
async def life(
    place: Path, keeper: FakeKeeper, *, options: MountOptions | None = None, served: FakeEngine | None = None
) -> AsyncIterator[Mounted]:
    """A daemon's; at the end of the block it goes, and leaves the mount if `keeper` says so."""
    keeper.leaving = False
    async with trio.open_nursery() as nursery:
        run = trio.CancelScope()

        async def serving(task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED) -> None:
            with run:
                await serve(
                    place,
                    served or engine(),
                    [ModelsLayout()],
                    options or MountOptions(),
                    keeper=keeper,
                    task_status=task_status,
                )

        yield await nursery.start(serving)
        run.cancel()


def path(place: Path) -> str:
    return str(place / "models/https/fake.example/a")


async def content(place: Path) -> bytes:
    done = await trio.run_process(["cat", path(place)], capture_stdout=True, check=False)
    return done.stdout


@asynccontextmanager
async def reader(place: Path) -> AsyncIterator[trio.Process]:
    """A client of the mount."""
    command = [sys.executable, "-I", "-S", "-c", READER, path(place)]
    client = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield client
    finally:
        client.kill()
        await client.wait()


async def said(client: trio.Process) -> bytes:
    """What it says until it ends."""
    assert client.stdout is not None
    found = b"".join([piece async for piece in client.stdout])
    assert await client.wait() == 0
    return found


@needs_mount
async def test_what_is_open_is_known_to_the_next_one(place: Path, keeper: FakeKeeper) -> None:
    engines = [engine(), engine(), engine()]
    async with trio.open_nursery() as nursery:
        clients = AsyncExitStack()
        async with life(place, keeper, served=engines[0]) as mounted:
            device = mounted.device
            client = await clients.enter_async_context(reader(place))
            assert client.stdout is not None
            assert client.stdin is not None
            assert await client.stdout.receive_some() == b"4096\n"
            keeper.leaving = True
        assert [mount.device for mount in mounts_at(place)] == [device]
        assert not engines[0].failing_all, "no error is the last word of a daemon that leaves"
        # Asked while nobody serves, and in flight when the second one leaves in its turn.
        engines[1].files["a"].gate = trio.Event()
        await client.stdin.send_all(b"go on\n")
        async with life(place, keeper, served=engines[1]) as mounted:
            assert mounted.device == device
            assert engines[1].files["a"].handles == 1
            await eventually(lambda: engines[1].waiting)
            keeper.leaving = True
        async with life(place, keeper, served=engines[2]):
            assert await said(client) == pattern("a", 0, SIZE)
            await eventually(lambda: not engines[2].files["a"].handles)
        await clients.aclose()
        nursery.cancel_scope.cancel()
    assert not mounts_at(place)
    assert keeper.kept is None, "a daemon that ends for good has its descriptors closed"


@needs_mount
async def test_a_file_that_is_passed_through_stays_so(
    place: Path, keeper: FakeKeeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The backing id is the connection's: another one for an inode that is open would be EIO."""
    caplog.set_level("INFO", logger="weightfs")
    async with AsyncExitStack() as clients:
        async with life(place, keeper, served=engine(tmp_path)) as mounted:
            if "Complete files are passed through" not in caplog.text:
                pytest.skip("no passthrough here")
            client = await clients.enter_async_context(reader(place))
            assert client.stdout is not None
            assert client.stdin is not None
            assert await client.stdout.receive_some() == b"4096\n"
            assert (mounted.stats.passed_opens, mounted.stats.passed_files) == (1, 1)
            keeper.leaving = True
        second = engine(tmp_path)
        async with life(place, keeper, served=second) as mounted:
            assert mounted.stats.passed_files == 1
            assert await content(place) == pattern("a", 0, SIZE)
            assert (mounted.stats.passed_opens, mounted.stats.passed_files) == (1, 1)
            await client.stdin.send_all(b"go on\n")
            assert await said(client) == pattern("a", 0, SIZE)
            await eventually(lambda: not mounted.stats.passed_files)
            assert await content(place) == pattern("a", 0, SIZE), "with a backing id of its own"
            assert mounted.stats.passed_opens == 2
            assert not second.files["a"].reads
            await eventually(lambda: not second.files["a"].handles)
    assert not mounts_at(place)


def spoil(keeper: FakeKeeper, change: Callable[[ledger.Ledger], None]) -> None:
    assert keeper.kept is not None
    with mmap.mmap(keeper.kept[1], ledger.SIZE) as memory, memoryview(memory) as view:
        change(ledger.Ledger(view))


def overflow(one: ledger.Ledger) -> None:
    one._slots = 0
    one.opened(2)


def try_often(one: ledger.Ledger) -> None:
    one.attempts = takeover.MAX_ATTEMPTS


def forget(one: ledger.Ledger) -> None:
    one._memory[:100] = bytes(100)


@needs_mount
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (overflow, "more than 65536 files"),
        (try_often, "5 daemons in a row"),
        (forget, "cannot be read"),
        (lambda _: None, "version 1, not 2"),
    ],
)
async def test_on_any_doubt_there_is_a_new_mount(
    place: Path,
    keeper: FakeKeeper,
    change: Callable[[ledger.Ledger], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with life(place, keeper):
        keeper.leaving = True
    spoil(keeper, change)
    if "version" in reason:
        monkeypatch.setattr(takeover, "VERSION", 2)
    async with life(place, keeper):
        assert len(mounts_at(place)) == 1
        assert await content(place) == pattern("a", 0, SIZE)
        assert keeper.drops == 1
        assert keeper.kept is not None, "the new one"
    assert f"is detached, and made anew: {reason}" in caplog.text.replace("it is of ", "").replace(
        "its ledger ", ""
    )
    assert not mounts_at(place)


@needs_mount
async def test_other_options_or_no_mount_any_more_is_a_new_mount(
    place: Path, keeper: FakeKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    async with life(place, keeper):
        keeper.leaving = True
    async with life(place, keeper, options=MountOptions(allow_other=True)):
        assert "its allow-other was false, and is to be true" in caplog.text
        assert await content(place) == pattern("a", 0, SIZE)
        keeper.leaving = True
    take_away(place, lazy=False)
    async with life(place, keeper, options=MountOptions(allow_other=True)):
        assert "it was unmounted" in caplog.text
        assert await content(place) == pattern("a", 0, SIZE)
    assert not mounts_at(place)


@needs_mount
@pytest.mark.parametrize("lacking", ["kernel", "store"])
async def test_without_kernel_or_store_who_leaves_unmounts(
    place: Path, lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="weightfs")
    if lacking == "kernel":
        monkeypatch.setattr(session, "_HAS_RESEND2", 0)
    keeper = FakeKeeper(available=lacking == "kernel")
    async with life(place, keeper):
        assert await content(place) == pattern("a", 0, SIZE)
        assert keeper.kept is None
        assert ("A restart cuts off what is open: the kernel" in caplog.text) == (lacking == "kernel")
        keeper.leaving = True
    assert not mounts_at(place)


def test_the_numbers_that_a_kernel_remembers() -> None:
    """Whoever changes them adds 1 to `takeover.VERSION`: a kernel asks an upgraded daemon by the old ones."""
    one = Namespace.build([("d/a", Inline(b"bytes")), ("d/l", Link("a"))])
    directory = one.lookup(ROOT, "d")
    assert isinstance(directory, DirNode)
    numbers = (directory.ino, *sorted(directory.children.values()), *directory.cookies)
    assert (takeover.VERSION, hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]) == (
        1,
        "b1c02d8e02d5b1d2",
    )

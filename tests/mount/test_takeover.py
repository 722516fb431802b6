"""Mounts that are handed from one `serve` to the next, in this process: what fits is taken over, all else begins anew."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from weightfs.layouts.models import ModelsLayout
from weightfs.mount import session, takeover
from weightfs.mount.inodes import number_of
from weightfs.mount.mounttable import mounts_at, take_away
from weightfs.mount.serve import Mounted, serve
from weightfs.mount.session import MountOptions
from weightfs.testing.fake_engine import FakeEngine, pattern
from weightfs.testing.mounts import can_mount, fusectl

needs_mount = pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
pytestmark = pytest.mark.mount

SIZE = 5000
READER = "import os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nprint(len(os.pread(fd, 4096, 0)), flush=True)\n"
READER += "sys.stdin.readline()\nos.posix_fadvise(fd, 0, 0, 4)\nsys.stdout.buffer.write(os.pread(fd, 9999, 0))\n"


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


def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.add([("a", SIZE)])
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


@needs_mount
async def test_what_is_open_is_known_to_the_next_one(place: Path, keeper: FakeKeeper) -> None:
    async with trio.open_nursery() as nursery:
        first = engine()
        async with life(place, keeper, served=first) as mounted:
            command = ["python3", "-I", "-S", "-c", READER, path(place)]
            start = lambda task_status=trio.TASK_STATUS_IGNORED: trio.run_process(  # noqa: E731 - a starter
                command, stdin=-1, capture_stdout=True, task_status=task_status
            )
            del start
            client = await trio.lowlevel.open_process(command, stdin=-1, stdout=-1)
            assert client.stdin is not None
            assert client.stdout is not None
            assert await client.stdout.receive_some() == b"4096\n"
            device = mounted.device
            keeper.leaving = True
        assert [mount.device for mount in mounts_at(place)] == [device]
        assert first.failing_all is False, "no answer was the last word of a daemon that left"
        second = engine()
        async with life(place, keeper, served=second) as mounted:
            assert mounted.device == device
            assert second.handles == 1
            await client.stdin.send_all(b"go on\n")
            got = b""
            async for piece in client.stdout:
                got += piece
            assert got == pattern("a", 0, SIZE)
            assert await client.wait() == 0
            with trio.fail_after(10):
                while second.handles:
                    await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert not mounts_at(place)
    assert keeper.kept is None, "a daemon that ends has its descriptors closed"

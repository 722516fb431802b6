"""The rules of browsing, on a mock clock, without a mount."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from weightfs.errors import CacheError, FailureKind, NoSpaceError, SourceError
from weightfs.layouts.models import ModelsLayout
from weightfs.mount import browsing
from weightfs.mount.browsing import AT_ONCE, BRIEFLY, Browser
from weightfs.mount.errno import errno_of_name
from weightfs.mount.inodes import ROOT, DirNode, Namespace
from weightfs.testing.fake_engine import FakeEngine
from weightfs.testing.layouts import git_blob, hub_manifest

Clock = trio.testing.MockClock
TTL, TIMEOUT = 60.0, 10.0
MAIN = "models/hf/org/name/main"
REF = "hf://org/name@main"


class Mount:
    """What `ops` does of a lookup."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.browser = Browser(self.engine, ttl=TTL, timeout=TIMEOUT)
        manifest = hub_manifest("org/name", "a" * 40, {"config.json": git_blob("c")})
        contents = {manifest.entries[0].blob.id: bytes(manifest.entries[0].blob.size)}
        self.engine.offers[REF] = lambda: self.engine.put(manifest, contents)

    @property
    def namespace(self) -> Namespace:
        return Namespace.build(ModelsLayout().entries(self.engine.manifests()[1:]))

    async def step(self, parent: int, name: str) -> int:
        """The number of a name in a directory."""
        node = self.namespace.lookup(parent, name)
        node = (
            node
            or await self.browser.find(self.namespace, parent, name)
            or self.namespace.lookup(parent, name)
        )
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node.ino

    async def walk(self, path: str) -> int:
        ino = ROOT
        for name in path.split("/"):
            ino = await self.step(ino, name)
        return ino

    async def code(self, path: str) -> int:
        """0, or the errno of walking there."""
        try:
            await self.walk(path)
        except pyfuse3.FUSEError as error:
            return error.errno
        return 0


@pytest.fixture
def mount() -> Iterator[Mount]:
    mount = Mount()
    yield mount
    assert not mount.browser._requests


async def test_a_path_is_resolved_once_and_then_it_is_there(mount: Mount, autojump_clock: Clock) -> None:
    ino = await mount.walk(MAIN)
    assert isinstance(mount.namespace.node(ino), DirNode)
    assert [await mount.walk(MAIN) for _ in range(3)] == [ino] * 3
    assert mount.engine.asked == [REF]


async def test_directories_on_the_way_have_the_number_that_they_will_have(
    mount: Mount, autojump_clock: Clock
) -> None:
    before = [await mount.walk(MAIN.rsplit("/", depth)[0]) for depth in (1, 2, 3)]
    assert mount.engine.asked == []
    await mount.walk(MAIN)
    assert [await mount.walk(MAIN.rsplit("/", depth)[0]) for depth in (1, 2, 3)] == before
    assert all(isinstance(mount.namespace.node(ino), DirNode) for ino in before)


@pytest.mark.parametrize(
    "path", ["models/.hidden", "models/hf/org/name/.git", "models/hf/-x", "models/x", "hf/org", "ollama/x"]
)
async def test_nobody_is_asked_about_what_cannot_be(mount: Mount, path: str, autojump_clock: Clock) -> None:
    assert await mount.code(path) == errno.ENOENT
    assert mount.engine.asked == []


@pytest.mark.parametrize(
    ("error", "code", "holds"),
    [
        (None, errno.ENOENT, TTL),  # nothing is offered: the origin's 404
        (SourceError("no", kind=FailureKind.AUTH), errno.EACCES, TTL),
        (SourceError("no", kind=FailureKind.CONNECT), errno.EIO, BRIEFLY),
        (SourceError("no", kind=FailureKind.BUSY), errno.EIO, BRIEFLY),
        (SourceError("no", kind=FailureKind.PROTOCOL), errno.EIO, BRIEFLY),
        (SourceError("no", kind=FailureKind.TIMEOUT), errno.ETIMEDOUT, BRIEFLY),
        (NoSpaceError("full"), errno.ENOSPC, BRIEFLY),
        (CacheError("sick"), errno.EIO, BRIEFLY),
        (RuntimeError("a bug"), errno.EIO, BRIEFLY),
    ],
)
async def test_each_answer_holds_for_its_time(
    mount: Mount, error: Exception | None, code: int, holds: float, autojump_clock: Clock
) -> None:
    if error is None:
        del mount.engine.offers[REF]
    else:
        mount.engine.offers[REF] = error
    for _ in range(100):
        assert await mount.code(MAIN) == code
    assert mount.engine.asked == [REF]
    await trio.sleep(holds - 0.1)
    assert await mount.code(MAIN) == code
    assert mount.engine.asked == [REF]
    await trio.sleep(0.2)
    assert await mount.code(MAIN) == code
    assert mount.engine.asked == [REF] * 2


def test_only_an_origins_own_word_is_enoent() -> None:
    codes = {kind: errno_of_name(SourceError("no", kind=kind)) for kind in FailureKind}
    assert [kind for kind, code in codes.items() if code == errno.ENOENT] == [FailureKind.NOT_FOUND]
    assert not {errno.EINTR, errno.EAGAIN, 0} & set(codes.values())


def test_who_may_not_know_is_not_told_that_there_is_none() -> None:
    # The Hub answers 401 for a repository that is missing, and for a private one alike.
    hidden = [SourceError("no", kind=FailureKind.NOT_FOUND, status=status) for status in (401, 403)]
    assert [errno_of_name(error) for error in hidden] == [errno.EACCES] * 2
    gone = [SourceError("no", kind=FailureKind.NOT_FOUND, status=status) for status in (404, 410, None)]
    assert [errno_of_name(error) for error in gone] == [errno.ENOENT] * 3


async def test_what_was_pinned_and_removed_is_not_fetched_again_at_once(
    mount: Mount, autojump_clock: Clock
) -> None:
    await mount.walk(MAIN)
    mount.engine.unpin(REF)
    assert await mount.code(MAIN) == errno.ENOENT
    assert mount.engine.asked == [REF]
    await trio.sleep(TTL + 1)
    assert await mount.code(MAIN) == 0


async def test_who_comes_together_is_asked_for_once(mount: Mount, autojump_clock: Clock) -> None:
    mount.engine.browsing = trio.Event()
    codes = []

    async def look() -> None:
        codes.append(await mount.code(MAIN))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        assert mount.engine.asked == [REF]
        assert not codes
        mount.engine.browsing.set()
    assert codes == [0] * 50
    assert mount.engine.asked == [REF]


async def test_a_lookup_waits_for_its_time_and_no_longer(mount: Mount, autojump_clock: Clock) -> None:
    mount.engine.browsing = trio.Event()
    began = trio.current_time()
    assert await mount.code(MAIN) == errno.ETIMEDOUT
    assert trio.current_time() - began == pytest.approx(TIMEOUT)
    assert await mount.code(MAIN) == errno.ETIMEDOUT
    assert mount.engine.asked == [REF]
    mount.engine.browsing = None
    await trio.sleep(BRIEFLY + 0.1)
    assert await mount.code(MAIN) == 0


async def test_few_requests_at_once(mount: Mount, autojump_clock: Clock) -> None:
    mount.engine.browsing = trio.Event()
    codes: list[int] = []

    async def look(number: int) -> None:
        codes.append(await mount.code(f"models/hf/org/name-{number}/main"))

    async with trio.open_nursery() as nursery:
        for number in range(3 * AT_ONCE):
            nursery.start_soon(look, number)
        await trio.testing.wait_all_tasks_blocked()
        assert len(mount.engine.asked) == AT_ONCE
        await trio.sleep(TIMEOUT - 1)
        mount.engine.browsing.set()
    assert codes == [errno.ENOENT] * (3 * AT_ONCE)


async def test_at_the_end_who_waits_is_answered_at_once(mount: Mount, autojump_clock: Clock) -> None:
    mount.engine.browsing = trio.Event()
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            assert await mount.code(MAIN) == errno.EIO

        nursery.start_soon(look)
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        mount.browser.stop()
    assert trio.current_time() == began
    assert await mount.code(MAIN) == errno.EIO
    assert mount.engine.asked == [REF]


async def test_memory_is_bounded_and_what_was_forgotten_is_looked_up_again(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, autojump_clock: Clock
) -> None:
    monkeypatch.setattr(browsing, "DIRECTORIES", 4)
    monkeypatch.setattr(browsing, "ANSWERS", 2)
    org = await mount.walk("models/hf/org")
    for number in range(20):
        assert await mount.code(f"models/hf/other-{number}/name/main") == errno.ENOENT
    assert (len(mount.browser._directories), len(mount.browser._answers)) == (4, 2)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.step(org, "name")
    assert caught.value.errno == errno.ESTALE  # the kernel then walks there again
    assert await mount.code(MAIN) == 0


async def test_a_file_has_nothing_below_it(mount: Mount, autojump_clock: Clock) -> None:
    ino = await mount.walk(f"{MAIN}/config.json")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mount.step(ino, "x")
    assert caught.value.errno == errno.ENOENT

"""The engine against plain bytes: whatever happens to origin, disk and process, a read gives the bytes or a ReadError.

A Hypothesis machine drives one cache through lives of an engine. It ends with faults gone: everything is then
complete, verified and right, and every check of engine and cache is silent. `WEIGHTFS_SOAK=1` makes it long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightfs.core.geometry import KIB, BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, ChunkList, Mirror, Policy
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref
from weightfs.engine import committer, dropping, seal
from weightfs.engine.blobs import BlobState
from weightfs.engine.engine import Engine, open_engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import (
    CacheError,
    FailureKind,
    IntegrityError,
    NoSpaceError,
    ReadError,
    SourceError,
    WeightfsError,
)
from weightfs.store.cache import Cache
from weightfs.testing.published import sample
from weightfs.testing.sources import Failing, FlakySource, MemorySource

SOAK = os.environ.get("WEIGHTFS_SOAK") == "1" or settings.get_current_profile_name() == "soak"
CHUNK = 64 * KIB
SIZES = {"listed": 11 * CHUNK + 77, "digest": 6 * CHUNK, "tiny": 1}
DATA = {name: sample(size, number) for number, (name, size) in enumerate(SIZES.items())}
NAMES = st.sampled_from(sorted(SIZES))
SECONDS = 60.0
LIMITS = Limits(
    backoff_base=0.001, backoff_cap=0.002, hold_base=0.005, hold_cap=0.01, max_retries=2, unsettled_bytes=4 * CHUNK,
    background_unsettled_bytes=3 * CHUNK, job_bytes=4 * CHUNK, first_job_bytes=2 * CHUNK,
)  # fmt: skip
SETTINGS = EngineSettings(
    workers=0,
    fill=FillMode.NEVER,
    limits=LIMITS,
    commit_seconds=0.002,
    commit_bytes=2 * CHUNK,
    read_timeout=20.0,
)
KINDS = st.sampled_from(
    [
        FailureKind.RESET,
        FailureKind.SHORT,
        FailureKind.BUSY,
        FailureKind.STALL,
        FailureKind.PROTOCOL,
        FailureKind.NO_RANGES,
        FailureKind.NOT_FOUND,
        FailureKind.CHANGED,
        FailureKind.WORKER,
        FailureKind.DISK,
        FailureKind.NO_SPACE,
    ]
)
T = TypeVar("T")


def ref_of(name: str) -> Ref:
    return Ref("memory", f"memory://{name}", f"memory://{name}", None)


class Origin(MemorySource):
    """Small chunks: `listed` has a trusted list, the others only a digest."""

    def blob(self, name: str) -> Blob:
        data = self.files[name]
        shape = BlobShape(len(data), CHUNK)
        sha256 = hashlib.sha256(data).digest()
        spans = [shape.span_of(chunk) for chunk in shape.chunks]
        digests = b"".join(hashlib.sha256(data[span.start : span.stop]).digest() for span in spans)
        listed = ChunkList(CHUNK, digests, trusted=True) if name == "listed" else None
        mirrors = (Mirror(f"memory://{name}", 1), Mirror(f"memory://{name}?second", 2))
        return Blob(BlobId.of_digest(sha256), shape, sha256, mirrors, listed)

    def open_range(self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False) -> Any:
        return super().open_range(replace(mirror, url=mirror.url.partition("?")[0]), shape, span, whole=whole)


@dataclass
class World:
    """What outlives an engine: the origin and its faults, and how many commits will fail."""

    faults: list[Failing] = field(default_factory=list)
    failing_commits: int = 0

    def plan(self, number: int, mirror: Mirror, span: ByteSpan) -> Failing | None:
        if not self.faults:
            return None
        if self.faults[0].kind is None and "listed" not in mirror.url:
            return None  # without a list wrong bytes are given out: that is what `provisional` means
        return self.faults.pop(0)

    def open_source(self, scheme: str, _settings: object) -> FlakySource:
        return FlakySource(Origin(dict(DATA)), self.plan)

    def commit(self, honest: Callable[..., None]) -> Callable[..., None]:
        def commit(cache: Cache, *args: Any, **kwargs: Any) -> None:
            if self.failing_commits:
                self.failing_commits -= 1
                raise NoSpaceError("the cache cannot write the index: it was told so by a test")
            honest(cache, *args, **kwargs)

        return commit


class Loop:
    """A trio run in a thread of its own: rules are plain functions, and an engine outlives many of them."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="weightfs-model")
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            self._ready.set()
            await self._stop.wait()
            self.nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        async def bounded() -> T:
            with trio.fail_after(SECONDS):
                return await function(*args)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def close(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join()


class Life:
    """One life of an engine, in a task of its own."""

    def __init__(self, root: Path, settings: EngineSettings) -> None:
        self.root = root
        self.settings = settings
        self.engine: Engine
        self._end = trio.Event()
        self._ended = trio.Event()
        self._calm = False
        self.error: Exception | None = None

    @asynccontextmanager
    async def _running(self) -> Any:
        cache = await trio.to_thread.run_sync(lambda: Cache.open(self.root, now=0))
        try:
            async with open_engine(cache, self.settings) as engine:
                yield engine
                if self._calm:
                    await engine.quiet()
                    problems = engine.check()
                    assert not problems, problems
            if self._calm:
                problems = await trio.to_thread.run_sync(lambda: cache.check(deep=True))
                assert not problems, problems
        finally:
            await trio.to_thread.run_sync(cache.close)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with self._running() as self.engine:
                for name in SIZES:
                    await self.engine.add(ref_of(name))
                task_status.started()
                await self._end.wait()
        except (Exception, BaseExceptionGroup) as error:
            self.error = AssertionError("the engine ended by itself")
            self.error.__cause__ = error
        finally:
            self._ended.set()

    async def end(self, *, calm: bool) -> None:
        self._calm = calm
        self._end.set()
        await self._ended.wait()
        if self.error:
            raise self.error


def state_of(engine: Engine, name: str) -> BlobState:
    return engine._parts.catalog.state(Origin(dict(DATA)).blob(name).id)


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.home = Path(tempfile.mkdtemp(prefix="weightfs-model-"))
        self.lives = 0
        self.patches: list[Any] = [
            mock.patch("weightfs.engine.worker.open_source", self.world.open_source),
            mock.patch("weightfs.engine.parts.open_source", self.world.open_source),
            mock.patch.object(Cache, "commit", self.world.commit(Cache.commit)),
            *(mock.patch.object(module, "RETRY_SECONDS", 0.005) for module in (committer, dropping, seal)),
        ]
        for patch in self.patches:
            patch.start()
        self.loop = Loop()

    @initialize()
    def begin(self) -> None:
        self.start(self.home / "0", SETTINGS)

    def start(self, root: Path, settings: EngineSettings) -> None:
        async def start() -> Life:
            life = Life(root, settings)
            await self.loop.nursery.start(life.run)
            return life

        self.life = self.loop.call(start)

    @property
    def engine(self) -> Engine:
        return self.life.engine

    # ---- readers

    async def read(self, name: str, start: int, length: int) -> None:
        engine, data = self.engine, DATA[name]
        start = start % len(data)
        span = ByteSpan(start, start + length).clamp(len(data))
        try:
            found = await engine.read(state_of(engine, name).id, span)
        except ReadError:
            return
        assert found == data[span.start : span.stop], f"wrong bytes of {name} in {span}"

    OFFSETS = st.integers(0, 12 * CHUNK)
    LENGTHS = st.sampled_from([1, 4096, CHUNK - 1, CHUNK + 1, 3 * CHUNK, 20 * CHUNK])

    @rule(name=NAMES, start=OFFSETS, length=LENGTHS)
    def one_reads(self, name: str, start: int, length: int) -> None:
        self.loop.call(self.read, name, start, length)

    @rule(
        spans=st.lists(st.tuples(NAMES, OFFSETS, LENGTHS), min_size=2, max_size=12),
        patience=st.integers(0, 30),
    )
    def many_read_and_some_go_away(self, spans: list[tuple[str, int, int]], patience: int) -> None:
        async def many() -> None:
            async with trio.open_nursery() as nursery:
                for span in spans:
                    nursery.start_soon(self.read, *span)
                async with trio.open_nursery() as impatient:
                    for span in spans[::2]:
                        impatient.start_soon(self.read, *span)
                    for _ in range(patience):
                        await trio.lowlevel.checkpoint()
                    impatient.cancel_scope.cancel()

        self.loop.call(many)

    @rule(name=NAMES)
    def one_opens(self, name: str) -> None:
        async def open_it() -> None:
            self.engine.opened(state_of(self.engine, name).id)

        self.loop.call(open_it)

    @rule(name=NAMES)
    def one_pulls(self, name: str) -> None:
        async def pull() -> None:
            try:
                await self.engine.complete(ref_of(name).text)
            except IntegrityError:
                raise
            except WeightfsError:
                pass

        self.loop.call(pull)

    # ---- faults

    @rule(kind=KINDS, after=st.sampled_from([0, 1, CHUNK, CHUNK + 5]), count=st.integers(1, 4))
    def origin_fails(self, kind: FailureKind, after: int, count: int) -> None:
        self.world.faults += [Failing(kind, after)] * count

    @rule(after=st.sampled_from([0, 17, CHUNK, 2 * CHUNK - 1]), count=st.integers(1, 3))
    def origin_flips_a_bit(self, after: int, count: int) -> None:
        self.world.faults += [Failing(None, after)] * count

    @rule(count=st.integers(1, 3))
    def commits_fail(self, count: int) -> None:
        self.world.failing_commits += count

    @rule(name=NAMES, chunks=st.none() | st.sets(st.integers(0, 11), min_size=1), reading=st.booleans())
    def evict_to_the_disk(self, name: str, chunks: set[int] | None, reading: bool) -> None:
        async def evict() -> None:
            engine = self.engine
            state = state_of(engine, name)
            async with trio.open_nursery() as nursery:
                if reading:
                    nursery.start_soon(self.read, name, 0, 20 * CHUNK)
                await engine._parts.holdings.evict(
                    state, chunks, lambda: not engine._parts.planner.busy(state.id)
                )

        self.loop.call(evict)

    @rule(chunks=st.integers(0, 20))
    def limit(self, chunks: int) -> None:
        async def limit() -> None:
            self.engine._parts.room._settings = replace(self.life.settings, max_bytes=chunks * CHUNK)
            await self.engine.gc()

        self.loop.call(limit)

    @rule(name=NAMES, chunks=st.sets(st.integers(0, 11), min_size=1))
    def evict(self, name: str, chunks: set[int]) -> None:
        async def drop() -> None:
            await self.engine._parts.holdings.drop(state_of(self.engine, name), chunks)

        self.loop.call(drop)

    @rule(name=NAMES, how=st.sampled_from(["cut", "delete", "replace"]), at=OFFSETS)
    def file_is_lost(self, name: str, how: str, at: int) -> None:
        path = self.file_of(name)
        if not path.exists():
            return
        if how == "cut":
            os.truncate(path, min(at, path.stat().st_size))
        elif how == "delete":
            path.unlink()
        else:
            other = path.with_name("other")
            other.write_bytes(bytes(SIZES[name]))
            other.rename(path)

    @rule(name=NAMES, at=OFFSETS)
    def bit_rots_and_verify_repairs(self, name: str, at: int) -> None:
        async def verify() -> None:
            if at // CHUNK not in state_of(self.engine, name).durable:
                return  # what is not recorded is not verified
            flip(self.file_of(name), at)
            while True:  # until nothing is in its way
                try:
                    report = await self.engine.verify(ref_of(name).text, repair=True)
                except WeightfsError:
                    await trio.sleep(0.01)
                else:
                    assert report.ok, report
                    return

        self.world.faults.clear()
        self.world.failing_commits = 0
        self.loop.call(verify)

    # ---- lives

    def file_of(self, name: str) -> Path:
        return self.life.root / "blobs" / str(Origin(dict(DATA)).blob(name).id)

    @rule(name=NAMES)
    def remove_and_add(self, name: str) -> None:
        async def again() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.read_what_may_be_gone, name)
                try:
                    await self.engine.remove(ref_of(name).text)
                finally:
                    await self.engine.add(ref_of(name))

        self.loop.call(again)

    async def read_what_may_be_gone(self, name: str) -> None:
        with contextlib.suppress(KeyError):  # removed before the state was looked up
            await self.read(name, 0, 3 * CHUNK)

    @rule(policy=st.sampled_from([Policy.PROVISIONAL, Policy.HOLD, Policy.STRICT]), rot=st.none() | OFFSETS)
    def restart_cleanly(self, policy: Policy, rot: int | None) -> None:
        self.world.failing_commits = 0
        self.loop.call(lambda: self.life.end(calm=False))
        if rot is not None:
            for name in SIZES:
                flip(self.file_of(name), rot)
        self.start(self.life.root, replace(SETTINGS, policy=policy))

    @rule(lost=st.lists(OFFSETS, max_size=3), cut=st.none() | OFFSETS)
    def restart_after_a_crash(self, lost: list[int], cut: int | None) -> None:
        self.lives += 1
        root = self.home / str(self.lives)
        old = self.life

        def copy() -> None:
            with (
                old.engine._parts.cache._changes
            ):  # between two transactions: a copy is not taken in an instant
                shutil.copytree(old.root, root)

        self.loop.call(lambda: trio.to_thread.run_sync(copy))
        self.world.failing_commits = 0
        self.loop.call(lambda: old.end(calm=False))
        shutil.rmtree(old.root)
        self.life = Life(root, SETTINGS)
        for name, size in SIZES.items():
            for at in lost:
                flip(self.file_of(name), at)
            if cut is not None and self.file_of(name).exists():
                os.truncate(self.file_of(name), min(cut % size, self.file_of(name).stat().st_size))
        self.start(root, old.settings)

    @precondition(lambda self: hasattr(self, "life"))
    @invariant()
    def books_agree(self) -> None:
        async def look() -> list[str]:
            if self.life.error:
                raise self.life.error
            engine = self.engine
            problems = engine._parts.planner.check()
            for state in engine._parts.catalog.states():
                if state.present_bytes != state.present.byte_count(state.shape):
                    problems.append(f"{state.ref}: wrong present_bytes")
                if state.may_be_passed and not engine._parts.cache.progress(state.id).use.whole:
                    problems.append(f"{state.ref}: may be passed through, and its file could be punched")
                problems += [
                    f"{state.ref}: {c} durable, not visible" for c in state.durable if c not in state.present
                ]
            return problems

        assert self.loop.call(look) == []

    def teardown(self) -> None:
        try:
            if hasattr(self, "life") and not self.life.error:
                self.world.faults.clear()
                self.world.failing_commits = 0
                self.loop.call(self.in_the_end_all_is_well)
        finally:
            self.loop.close()
            for patch in self.patches:
                patch.stop()
            shutil.rmtree(self.home)

    async def in_the_end_all_is_well(self) -> None:
        self.engine._parts.room._settings = self.life.settings
        await self.engine._parts.room._measure()
        for name, data in DATA.items():
            while True:
                try:
                    # A file that was deleted is served by its open descriptor until somebody looks.
                    await self.engine.verify(ref_of(name).text, repair=True)
                    await self.engine.complete(ref_of(name).text)
                    assert (
                        await self.engine.read(state_of(self.engine, name).id, ByteSpan(0, len(data))) == data
                    )
                except (ReadError, SourceError, CacheError):  # a hold that is still on
                    await trio.sleep(0.005)
                else:
                    break
        await self.life.end(calm=True)


def flip(path: Path, at: int) -> None:
    """One bit of the file; nothing where there is no such byte."""
    if path.exists() and at < path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 4]))


EngineMachine.TestCase.settings = settings(
    max_examples=3_000 if SOAK else 12,
    stateful_step_count=60 if SOAK else 20,
    suppress_health_check=list(HealthCheck),
    deadline=None,
    print_blob=True,
)
TestEngine = EngineMachine.TestCase

"""Races between readers, drops, commits, removals and the end of an engine."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio

from weightfs.core.bandwidth import Pacer
from weightfs.core.geometry import MIB, ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId, Policy, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine import reader, wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.committer import Committer
from weightfs.engine.engine import Engine
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.hashing import Hasher
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind, ReadError
from weightfs.store.disk import disk_errors
from weightfs.store.memory import MemoryFile
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, open_origin
from weightfs.testing.published import CHUNK, published_origin, sample

SIZE = 12 * CHUNK + 5
DATA = sample(SIZE)
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, limits=Limits(hold_base=0.05), commit_seconds=0.01)
SECONDS = 30


@asynccontextmanager
async def opened(
    root: Path, settings: EngineSettings = LAZY
) -> AsyncIterator[tuple[Engine, Origin, Ref, BlobId]]:
    async with published_origin(DATA) as (origin, ref), running_engine(root, settings) as engine:
        blob = (await engine.add(ref, headers=False)).entries[0].blob.id
        with trio.fail_after(SECONDS):
            yield engine, origin, ref, blob


async def read(engine: Engine, blob: BlobId, start: int = 0, stop: int = SIZE) -> None:
    assert await engine.read(blob, ByteSpan(start, stop)) == DATA[start:stop]


async def fails(engine: Engine, blob: BlobId, *kinds: FailureKind) -> None:
    with pytest.raises(ReadError) as caught:
        await engine.read(blob, ByteSpan(0, SIZE))
    assert caught.value.kind in kinds


async def test_many_readers_of_a_suspect_chunk(tmp_path: Path) -> None:
    """Regression: the second one asked an event for its truth, and trio refuses that."""
    async with published_origin(DATA) as (_, ref):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await read(engine, blob)
            await engine.quiet()
            shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        async with running_engine(tmp_path / "crashed", LAZY) as engine:
            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    for _ in range(8):
                        nursery.start_soon(read, engine, blob)


async def test_the_committer_goes_on_after_somebody_else_flushed(tmp_path: Path) -> None:
    """Regression: it waited for an event that `flush` had replaced."""
    async with opened(tmp_path / "cache") as (engine, _, _, blob):
        await engine._parts.committer.flush()
        await read(engine, blob, 0, 1)
        while engine._parts.committer.pending:
            await trio.sleep(0.001)


async def test_adding_again_while_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the removal deleted the records and the file of the blob that had just been added again."""
    removing, go_on, added = trio.Event(), trio.Event(), trio.Event()
    honest = Fetcher.drained

    async def slowly(self: Fetcher, state: BlobState) -> None:
        removing.set()
        await go_on.wait()
        await honest(self, state)

    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await read(engine, blob, 0, 3 * CHUNK)
        monkeypatch.setattr(Fetcher, "drained", slowly)

        async def add_and_read() -> None:
            await engine.add(ref)
            await read(engine, blob)
            added.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.remove, str(ref))
            await removing.wait()
            nursery.start_soon(add_and_read)
            for _ in range(100):  # long enough for an adding that does not wait for the removal
                if not added.is_set():
                    await trio.sleep(0.003)
            go_on.set()
        await engine.complete(str(ref))
        await read(engine, blob)


async def test_what_lands_in_a_lost_file_has_not_landed(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as (engine, origin, _, blob):
        origin.always["/m.bin"] = Fault(FaultKind.STALL_BEFORE_BODY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, engine, blob, 0, 1)
            while not engine._parts.fetcher.jobs:
                await trio.sleep(0.001)
            (job,) = (flight.job for flight in engine._parts.planner.jobs(0.0))
            state = engine._parts.catalog.state(blob)
            state.life += 1  # as if the file had been lost while the worker's word was on its way
            engine._parts._handle(wire.ChunkLanded(job, 0, hashlib.sha256(DATA[:CHUNK]).hexdigest()))
            assert 0 not in state.present
            origin.always.clear()
            engine._parts.fetcher.abandon(state)
        await read(engine, blob)


async def test_a_cancelled_removal_is_finished(tmp_path: Path) -> None:
    """Regression: the ref was gone, and its file stayed for ever."""
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await read(engine, blob)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.remove, str(ref))
                while engine.manifests():
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert list((tmp_path / "cache" / "blobs").iterdir()) == []


async def test_readers_of_a_removed_model_are_told_so(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await read(engine, blob)
        state = engine._parts.catalog.state(blob)
        await engine.remove(str(ref))
        with pytest.raises(ReadError) as caught:
            await engine._parts.reader._read_slowly(
                state, ByteSpan(0, SIZE), state.shape.chunks, engine._parts.reader._observe
            )
        assert caught.value.kind is FailureKind.CANCELLED
        await engine.add(ref)
        state.present.clear()
        with pytest.raises(ReadError):  # not answered by the books of the blob's next life
            await engine._parts.fetcher.wait_for(state, state.shape.chunks)


async def test_a_drop_while_the_sealer_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: hashing went on from what was dropped, between the drop and the restart of the running hash."""
    async with published_origin(DATA) as (origin, place):
        del origin.files["/m.bin.meta4"]
        ref = parse_ref(f"{place}#sha256={hashlib.sha256(DATA).hexdigest()}")
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            with trio.fail_after(SECONDS):
                blob = (await engine.add(ref)).entries[0].blob.id
                await engine.complete(str(ref))
                state = engine._parts.catalog.state(blob)
                seen: list[int] = []
                forget = Committer.forget

                async def slowly(self: Committer, blob: BlobId, chunks: set[int] | None = None) -> int:
                    seen.append(state.frontier)
                    return await forget(self, blob, chunks)

                monkeypatch.setattr(Committer, "forget", slowly)
                await engine._parts.holdings.drop(state, [0])
                assert seen == [0]
                assert state.trust is Trust.PROVISIONAL
                await engine.complete(str(ref))


@pytest.mark.parametrize("policy", [Policy.PROVISIONAL, Policy.HOLD])
async def test_fail_reads_ends_every_wait(tmp_path: Path, policy: Policy) -> None:
    settings = replace(LAZY, policy=policy, read_timeout=0)
    async with (
        published_origin(DATA) as (origin, ref),
        running_engine(tmp_path / "c", settings, calm=False) as engine,
    ):
        blob = (await engine.add(ref)).entries[0].blob.id
        origin.always["/m.bin"] = Fault(FaultKind.STALL_BEFORE_BODY)
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(fails, engine, blob, FailureKind.CANCELLED)
                while not origin.requests("/m.bin")[1:]:
                    await trio.sleep(0.001)
                engine.fail_reads()
            await fails(engine, blob, FailureKind.CANCELLED)
        await engine.remove(str(ref))


@pytest.mark.parametrize("steps", range(0, 60, 7))
async def test_a_reader_cancelled_at_any_await_leaves_nothing_behind(tmp_path: Path, steps: int) -> None:
    async with opened(tmp_path / "cache") as (engine, _, _, blob):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for start in range(0, SIZE, 3 * CHUNK):
                    nursery.start_soon(read, engine, blob, start, min(SIZE, start + 4 * CHUNK))
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert engine._parts.planner.waiting() == 0
        await read(engine, blob)


@pytest.mark.parametrize("steps", [0, 5, 50, 200])
async def test_an_engine_may_end_while_jobs_run(tmp_path: Path, steps: int) -> None:
    async with published_origin(DATA) as (_, ref):
        settings = replace(LAZY, fill=FillMode.ALL)
        async with running_engine(tmp_path / "cache", settings, calm=False) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            with trio.fail_after(SECONDS):
                await read(engine, blob)


async def test_a_pull_brings_back_what_was_dropped_of_a_verified_blob(tmp_path: Path) -> None:
    """Regression: a verified blob counted as complete, whatever had been dropped of it since."""
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await engine.complete(str(ref))
        await engine._parts.holdings.drop(engine._parts.catalog.state(blob), [2, 3])
        engine._parts.catalog.state(blob).filling = False
        await engine.complete(str(ref))
        assert engine.blob_status(blob).complete


async def test_an_empty_blob(tmp_path: Path) -> None:
    """Regression: sealing looked for a file that nobody had made, and said so every five seconds."""
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    async with open_origin({"/empty": b""}) as origin, running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(f"{origin.url('empty')}#sha256={digest}")
        with trio.fail_after(SECONDS):
            blob = (await engine.add(ref)).entries[0].blob.id
            await engine.complete(str(ref))
            assert engine.blob_status(blob).trust == Trust.VERIFIED
            assert await engine.read(blob, ByteSpan(0, 0)) == b""


async def test_a_blob_removed_while_another_one_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the sealer took a blob out of its queue that was no longer in it, and the engine ended."""
    files = {"/a": sample(3 * MIB, 1), "/b": sample(3 * MIB, 2)}
    hashing = [trio.Event(), trio.Event()]
    go_on = [trio.Event(), trio.Event()]
    honest = Hasher.hash

    async def slowly(self: Hasher, state: BlobState, chunks: ChunkSpan, **how: bool) -> wire.Hashed:
        call = 1 if hashing[0].is_set() else 0
        hashing[call].set()
        await go_on[call].wait()
        return await honest(self, state, chunks, **how)

    monkeypatch.setattr(Hasher, "hash", slowly)
    async with open_origin(files) as origin, running_engine(tmp_path / "cache", LAZY) as engine:
        with trio.fail_after(SECONDS):
            refs = [
                parse_ref(f"{origin.url(path)}#sha256={hashlib.sha256(data).hexdigest()}")
                for path, data in files.items()
            ]
            first, second = [(await engine.add(ref)).entries[0].blob.id for ref in refs]
            await engine.read(first, ByteSpan(0, 1))
            await hashing[0].wait()
            await engine.read(first, ByteSpan(0, 3 * MIB))
            await engine.read(second, ByteSpan(2 * MIB, 3 * MIB))  # nothing of it can be hashed yet
            while not engine._parts.sealer._queued(engine._parts.catalog.state(second)):
                await trio.sleep(0.001)
            go_on[0].set()  # the next round sees both
            await hashing[1].wait()
            await engine.remove(str(refs[1]))
            go_on[1].set()
            await engine.complete(str(refs[0]))


async def test_a_suspect_chunk_is_kept_when_there_are_no_descriptors_to_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a good chunk was dropped, and called a fault of the disk, for want of a descriptor (EMFILE)."""
    monkeypatch.setattr(reader, "SCARCE_SECONDS", 0)
    async with opened(tmp_path / "cache") as (engine, _, _, blob):
        await read(engine, blob)
        await engine.quiet()
        before = engine.status().fetched_bytes
        real, failures = engine._parts.cache.read, iter(range(2))

        def scarce(blob: BlobId, span: ByteSpan) -> bytes:
            if next(failures, None) is not None:
                with disk_errors("open a file"):
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(blob, span)

        monkeypatch.setattr(engine._parts.cache, "read", scarce)
        engine._parts.catalog.state(blob).suspect.add(2)
        await read(engine, blob, 2 * CHUNK, 3 * CHUNK)
        assert next(failures, None) is None
        assert engine._parts.holdings.disk_faults == 0
        assert engine.status().fetched_bytes == before
        await engine.quiet()
        assert engine.check() == []


class _Jobs:
    """A pool in which nothing happens by itself."""

    def __init__(self) -> None:
        self.submitted: list[wire.FetchJob | wire.HashJob] = []

    def submit(self, job: wire.FetchJob | wire.HashJob) -> None:
        self.submitted.append(job)

    def tell(self, message: wire.TrimJob | wire.StopJob | wire.GoOn) -> None:
        pass


async def test_what_was_on_its_way_to_memory_when_the_chunk_list_changed_is_not_given_out(
    tmp_path: Path,
) -> None:
    """Regression: it had been judged by the older list, or by none, and landed after everything else was dropped."""
    memory, jobs = MemoryFile(), _Jobs()
    try:
        async with opened(tmp_path / "cache") as (engine, _, _, blob), trio.open_nursery() as nursery:
            state = engine._parts.catalog.state(blob)
            pool, pacer = cast("WorkerPool", jobs), Pacer(None, {})
            uncached = Uncached(LAZY.limits, pool, memory, pacer, Tally(), nursery)
            uncached.want(state, ChunkSpan(0, 1))
            (job,) = jobs.submitted
            uncached.changed(state)
            uncached.handle(wire.ChunkLanded(job.job, 0, "00" * 32))
            assert not uncached.has(state, 0)
            uncached.handle(wire.JobFailed(job.job, FailureKind.CANCELLED, "stopped"))
            assert not uncached.has(state, 0)
            assert uncached.planner.idle()
            assert uncached.check() == []
    finally:
        memory.close()

"""A disk that gives errors: every reader gets the right bytes, nothing is recorded that is not there, and it is told.

Where the kernel lets us, the errors are real: `testing.sick_disk` refuses below the block layer, and ext4 makes itself
read-only. Else they are put where the store touches the disk.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.diskhealth import HealthRules
from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import BlobId, Policy
from weightfs.core.plan import Limits
from weightfs.core.readahead import ReadAhead
from weightfs.core.ref import Ref
from weightfs.engine import committer, dropping, health, seal, uncached, worker
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import DiskFault, FailureKind, NoDescriptorsError, NoSpaceError, ReadError
from weightfs.store.cache import Cache
from weightfs.testing import disks
from weightfs.testing.daemon import Daemon
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind
from weightfs.testing.published import CHUNK, bytes_asked, published_origin, sample
from weightfs.testing.sick_disk import SickDisk, sick_disk
from weightfs.testing.waiting import until

COUNT = 24
SIZE = COUNT * CHUNK + 123
DATA = sample(SIZE, 7)
LIMITS = Limits(hold_base=0.05, hold_cap=0.2, backoff_base=0.01, backoff_cap=0.1)
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, limits=LIMITS, commit_seconds=0.01, readahead_bytes=0)
QUICK = HealthRules(merge=0.02, pause=0.05, calm=0.1, longest_calm=0.5)
AT_ONCE = HealthRules(errors=1, pause=3600.0)  # the first error bypasses, and nobody tries the disk
SECONDS = 30
BROKEN = DiskFault("the cache cannot write the index: Input/output error")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (committer, dropping, seal):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(uncached, "REFUSAL_SECONDS", 0.05)
    monkeypatch.setattr(health, "RULES", QUICK)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SickDisk]:
    if (why := disks.missing("ext4")) is not None or not Path("/dev/fuse").exists():
        pytest.skip(f"no disk can be made sick here: {why or 'no /dev/fuse'}")
    place = tmp_path / "sick"
    place.mkdir()
    with sick_disk(place) as made:
        yield made


async def added(engine: Engine, ref: Ref) -> BlobId:
    blob = (await engine.add(ref)).entries[0].blob
    assert blob.shape.chunk_length == CHUNK
    return blob.id


async def reads(engine: Engine, blob: BlobId, start: int = 0, stop: int = SIZE) -> None:
    span = ByteSpan(start, stop).clamp(SIZE)
    assert await engine.read(blob, span) == DATA[span.start : span.stop]


async def half(engine: Engine, blob: BlobId) -> None:
    """Every other chunk is cached and durable."""
    for start in range(0, SIZE, 2 * CHUNK):
        await reads(engine, blob, start, start + 1)
    await engine.quiet()


async def until_disk(engine: Engine, state: str, blob: BlobId) -> None:
    """Readers go on all the while."""
    generator = random.Random(3)
    while engine.status().disk != state:
        start = generator.randrange(SIZE)
        await reads(engine, blob, start, start + generator.randrange(1, 2 * CHUNK))
        await trio.sleep(0.005)


# ---- real errors


@pytest.mark.parametrize("workers", [0, 1])
async def test_writes_that_fail_are_bypassed_and_come_back(
    disk: SickDisk, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root, settings = disk.directory / "cache", replace(LAZY, workers=workers)
    async with published_origin(DATA) as (origin, ref), running_engine(root, settings) as engine:
        blob = await added(engine, ref)
        with trio.fail_after(2 * SECONDS):
            await half(engine, blob)
            kept = engine.blob_status(blob).present_bytes
            disk.refuse(writes=True)
            await until_disk(engine, "bypassed", blob)
            await engine.quiet()
            status = engine.status()
            assert "Input/output error" in status.trouble
            assert engine.blob_status(blob).present_bytes == kept  # all that was there, and nothing else
            with pytest.raises(
                DiskFault, match="cannot be completed: the cache's disk fails again and again"
            ):
                await engine.complete(str(ref))
            asked = bytes_asked(origin)
            for _ in range(3):
                await reads(engine, blob)
            assert bytes_asked(origin) <= asked + SIZE - kept
            assert engine.backing(blob) is None
            disk.refuse()
            await until_disk(engine, "healthy", blob)
            await engine.complete(str(ref))
            assert engine.backing(blob) is not None
            while engine.status().trouble:
                await trio.sleep(0.01)
            await reads(engine, blob)
    assert caplog.text.count("is healthy again") == 1
    assert caplog.text.count("is bypassed: ") == 1


async def test_a_filesystem_that_made_itself_read_only_goes_on_serving(disk: SickDisk) -> None:
    root = disk.directory / "cache"
    async with published_origin(DATA) as (_, ref), running_engine(root, LAZY) as engine:
        blob = await added(engine, ref)
        with trio.fail_after(SECONDS):
            await half(engine, blob)
            kept = engine.blob_status(blob).present_bytes
            subprocess.run(["mount", "-o", "remount,abort", str(disk.directory)], check=True)
            await until_disk(engine, "bypassed", blob)
            assert "ead-only file system" in engine.status().trouble
            await reads(engine, blob)
            assert engine.blob_status(blob).present_bytes == kept


async def test_a_fill_stops_while_the_disk_is_bypassed_and_goes_on_by_itself(disk: SickDisk) -> None:
    settings = replace(LAZY, fill=FillMode.OPENED)
    async with (
        published_origin(DATA) as (origin, ref),
        running_engine(disk.directory / "c", settings) as engine,
    ):
        blob = await added(engine, ref)
        with trio.fail_after(SECONDS):
            disk.refuse(writes=True)
            engine.opened(blob)
            while engine.status().disk != "bypassed":
                await trio.sleep(0.01)
            await engine.quiet()
            asked = bytes_asked(origin)
            for _ in range(50):
                await trio.sleep(0.001)
            assert bytes_asked(origin) == asked
            disk.refuse()
            while not engine.blob_status(blob).complete:
                await trio.sleep(0.01)
            await engine.quiet()
            engine.released(blob)


# Shorter times, in the daemon's process.
PATCH = """
from weightfs.engine import health, uncached
from weightfs.core.diskhealth import HealthRules
health.RULES = HealthRules(merge=0.05, pause=0.1, calm=0.3)
"""
SAME = "print(hashlib.sha256(open(path, 'rb').read()).digest() == hashlib.sha256(open(plain, 'rb').read()).digest())"
FIRST = "fd = cold(); print(os.pread(fd, 2 << 20, 0) == true(0, 2 << 20))"


def forget_pages(daemon: Daemon, ref: str) -> None:
    """The kernel has to read the cache's file from the disk again."""
    descriptor = os.open(daemon.cache / "blobs" / str(daemon.file(ref)["blob"]), os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def test_readers_of_a_mount_never_see_that_the_disk_is_sick(disk: SickDisk, tmp_path: Path) -> None:
    """End to end: errors of writing first, then of reading what is cached; told in `status`; and back to normal."""
    plain = tmp_path / "plain.bin"
    plain.write_bytes(random.Random(5).randbytes(16 * MIB + 17))
    ref = f"file://{plain}"
    options = ["--fill", "never", "--workers", "1", "--min-free", "0", "--no-passthrough"]
    with Daemon(disk.directory, ref, options=options, sabotage=PATCH) as daemon:
        daemon.start()
        assert daemon.run(FIRST, ref, plain) == "True"
        until(lambda: daemon.file(ref)["durable_chunks"] >= 2, "two chunks are on the disk")
        daemon.quiet(ref)
        disk.refuse(writes=True)
        assert daemon.run(SAME, ref, plain) == "True"
        until(lambda: daemon.status()["disk"] == "bypassed", "the disk is bypassed")
        shown = daemon.cli("status").stdout
        assert "disk: bypassed" in shown
        assert "trouble: the cache's disk fails again and again" in shown
        refused = daemon.cli("pull", ref)
        assert refused.returncode == 5
        assert "cannot be completed" in refused.stderr
        assert daemon.run(SAME, ref, plain) == "True"
        disk.refuse()
        until(lambda: daemon.status()["disk"] == "healthy", "the disk is healthy")
        daemon.complete(ref)
        before = daemon.status()["disk_faults"]
        forget_pages(daemon, ref)
        disk.refuse(reads=True)
        drop = f"os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)\n{SAME}"
        assert daemon.run(drop, ref, plain) == "True"
        assert daemon.status()["disk_faults"] > before
        disk.refuse()
        until(lambda: daemon.status()["disk"] == "healthy", "the disk is healthy again")
        daemon.complete(ref)
        assert daemon.run(SAME, ref, plain) == "True"
        until(lambda: daemon.status()["trouble"] == "", "nothing is said to be wrong any more")
        assert daemon.stop() == 0


# ---- errors put in


class Spots:
    """`Cache.read` gives EIO for these chunks, until they are written again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chunks: set[int]) -> None:
        self.chunks = chunks
        honest = Cache.read

        def read(cache: Cache, blob: BlobId, span: ByteSpan) -> bytes:
            if any(chunk * CHUNK < span.stop and span.start < (chunk + 1) * CHUNK for chunk in self.chunks):
                raise DiskFault(f"the cache cannot read {cache.path(blob)}: Input/output error")
            return honest(cache, blob, span)

        monkeypatch.setattr(Cache, "read", read)
        monkeypatch.setattr(Cache, "read_nowait", lambda *_: None)


async def test_a_chunk_that_cannot_be_read_comes_from_the_network_and_its_loss_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        with trio.fail_after(SECONDS):
            await engine.complete(str(ref))
            spots = Spots(monkeypatch, {5})
            await reads(engine, blob)
            status = engine.status()
            assert status.disk != "healthy"
            assert status.disk_faults > 0
            assert 5 not in engine._parts.catalog.state(blob).durable
            await reads(engine, blob, 7 * CHUNK, 8 * CHUNK)
            spots.chunks.clear()
            await until_disk(engine, "healthy", blob)
            await engine.complete(str(ref))


def bypass(engine: Engine) -> None:
    engine._parts.watch.failed(BROKEN)
    assert engine.status().disk == "bypassed"


@pytest.fixture
def first_error_bypasses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "RULES", AT_ONCE)


@pytest.mark.usefixtures("first_error_bypasses")
async def test_a_fill_that_is_under_way_stops_at_the_bypass(tmp_path: Path) -> None:
    """Also where the file itself is sound, so that nothing but the bypass is in the way."""
    settings = replace(LAZY, fill=FillMode.OPENED, limits=replace(LIMITS, background_jobs=1))
    async with (
        published_origin(DATA) as (origin, ref),
        running_engine(tmp_path / "cache", settings) as engine,
    ):
        blob = await added(engine, ref)
        with trio.fail_after(SECONDS):
            engine.opened(blob)
            while not engine.blob_status(blob).present_bytes:
                await trio.sleep(0)
            bypass(engine)
            await engine.quiet()
            assert engine.blob_status(blob).present_bytes < SIZE
            asked = bytes_asked(origin)
            for _ in range(50):
                await trio.sleep(0.001)
            assert bytes_asked(origin) == asked
            engine.released(blob)


@pytest.mark.usefixtures("first_error_bypasses")
async def test_one_chunk_is_fetched_once_for_all_who_want_pieces_of_it(tmp_path: Path) -> None:
    async with published_origin(DATA) as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        before = bytes_asked(origin)
        bypass(engine)
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for piece in range(16):
                    start = 3 * CHUNK + piece * CHUNK // 16
                    nursery.start_soon(reads, engine, blob, start, start + CHUNK // 16)
            for piece in range(16):
                await reads(
                    engine, blob, 3 * CHUNK + piece * CHUNK // 16, 3 * CHUNK + (piece + 1) * CHUNK // 16
                )
        assert bytes_asked(origin) == before + CHUNK
        status = engine.status()
        assert (status.uncached_bytes, status.cache_bytes, status.held_bytes) == (CHUNK, 0, 0)


@pytest.mark.usefixtures("first_error_bypasses")
async def test_memory_is_bounded_however_many_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, limit = 0, 6 * CHUNK
    monkeypatch.setattr(uncached, "MEMORY_BYTES", limit)
    settings = replace(LAZY, readahead_bytes=64 * MIB)
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", settings) as engine:
        blob = await added(engine, ref)
        await half(engine, blob)
        bypass(engine)

        async def watch() -> None:
            nonlocal most
            while True:
                taken = os.fstat(engine._parts.memory.descriptor).st_blocks * 512
                most = max(most, taken, engine._parts.uncached.planner.held_bytes)
                await trio.sleep(0)

        async def one(seed: int) -> None:
            generator = random.Random(seed)
            for _ in range(6):
                start = generator.randrange(SIZE)
                await reads(engine, blob, start, start + generator.randrange(1, 8 * CHUNK))

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                async with trio.open_nursery() as readers:
                    for seed in range(20):
                        readers.start_soon(one, seed)
                nursery.cancel_scope.cancel()
    assert CHUNK < most <= limit


@pytest.mark.usefixtures("first_error_bypasses")
async def test_a_stream_of_everything_that_is_larger_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncached, "MEMORY_BYTES", SIZE // 2)
    faults = {"/m.bin": Fault(FaultKind.NO_RANGES)}
    async with (
        published_origin(DATA, faults=faults) as (_, ref),
        running_engine(tmp_path / "cache", LAZY) as engine,
    ):
        blob = await added(engine, ref)
        bypass(engine)
        with trio.fail_after(SECONDS), pytest.raises(ReadError, match="in memory at once") as caught:
            await engine.read(blob, ByteSpan(0, 1))
        assert caught.value.kind is FailureKind.NO_SPACE


@pytest.mark.usefixtures("first_error_bypasses")
@pytest.mark.parametrize("policy", [Policy.HOLD, Policy.STRICT])
async def test_what_must_be_proven_first_is_not_given_out_unproven(tmp_path: Path, policy: Policy) -> None:
    """The chunk list of an http origin on loopback is trusted: `strict` is served by it, chunk by chunk."""
    settings = replace(LAZY, policy=policy)
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", settings) as engine:
        blob = await added(engine, ref)
        bypass(engine)
        with trio.fail_after(SECONDS):
            if policy is Policy.STRICT:
                await reads(engine, blob, 0, 2 * CHUNK)
                return
            with pytest.raises(ReadError, match="cannot prove") as caught:
                await engine.read(blob, ByteSpan(0, 1))
            assert caught.value.kind is FailureKind.DISK


@pytest.mark.usefixtures("first_error_bypasses")
async def test_wrong_bytes_are_no_more_given_out_than_from_the_cache(tmp_path: Path) -> None:
    settings = replace(LAZY, limits=replace(LIMITS, hold_base=3600.0, hold_cap=3600.0))
    async with (
        published_origin(DATA) as (origin, ref),
        running_engine(tmp_path / "cache", settings) as engine,
    ):
        blob = await added(engine, ref)
        bypass(engine)
        wrong = bytearray(DATA)
        wrong[2 * CHUNK] ^= 1
        honest = origin.files["/m.bin"]
        origin.files["/m.bin"] = replace(honest, data=bytes(wrong), etag=honest.tag)
        with trio.fail_after(SECONDS):
            await reads(engine, blob, 0, CHUNK)
            with pytest.raises(ReadError) as caught:
                await engine.read(blob, ByteSpan(2 * CHUNK, 3 * CHUNK))
            assert caught.value.kind is FailureKind.MISMATCH


@pytest.mark.usefixtures("first_error_bypasses")
async def test_a_model_that_is_removed_leaves_nothing_in_memory(tmp_path: Path) -> None:
    async with published_origin(DATA) as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        bypass(engine)
        with trio.fail_after(SECONDS):
            await reads(engine, blob, 0, 4 * CHUNK)
            origin.always["/m.bin"] = Fault(FaultKind.STALL_BEFORE_BODY)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gets_told, engine, blob)
                while not engine._parts.uncached.planner.waiting():
                    await trio.sleep(0)
                await engine.remove(str(ref))
        assert engine._parts.uncached.planner.held_bytes == 0
        assert os.fstat(engine._parts.memory.descriptor).st_blocks == 0
        assert not engine._parts.memory._bases


async def gets_told(engine: Engine, blob: BlobId) -> None:
    with pytest.raises(ReadError) as caught:
        await engine.read(blob, ByteSpan(9 * CHUNK, 10 * CHUNK))
    assert caught.value.kind is FailureKind.CANCELLED


async def test_what_nobody_reads_any_more_leaves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RULES", AT_ONCE)
    monkeypatch.setattr(uncached, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(uncached, "SWEEP_SECONDS", 0.01)
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        bypass(engine)
        with trio.fail_after(SECONDS):
            await reads(engine, blob, 0, 4 * CHUNK)
            while engine._parts.uncached.planner.held_bytes:
                await trio.sleep(0.01)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["chunk", "file"])
async def test_whoever_cannot_write_blames_the_disk_and_no_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """A write into the page cache seldom fails, even on a sick disk: the errors above are mostly those of syncs."""
    monkeypatch.setattr(health, "RULES", AT_ONCE)

    write = worker._pwrite_all

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def fails_on_disk(fd: int, data: memoryview, offset: int) -> None:
        if "memfd" not in os.readlink(f"/proc/self/fd/{fd}"):
            fails()
        write(fd, data, offset)

    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        if where == "chunk":
            monkeypatch.setattr(worker, "_pwrite_all", fails_on_disk)
        else:
            monkeypatch.setattr(os, "ftruncate", fails)
        with trio.fail_after(SECONDS):
            await reads(engine, blob, 0, CHUNK)
            status = engine.status()
            assert status.disk == "bypassed"
            assert os.strerror(number) in status.trouble
            assert [mirror.faults for mirror in status.refs[0].files[0].mirrors] == [0]
            assert engine.blob_status(blob).present_bytes == 0
        monkeypatch.undo()


async def test_a_full_disk_is_not_a_sick_one(tmp_path: Path) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        engine._parts.watch.failed(NoSpaceError("full"))
        assert engine.status().disk == "healthy"


async def test_a_trial_for_which_there_are_no_descriptors_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it counted as an error of the disk, which was bypassed for want of something else."""
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        trial = engine._parts.cache.trial
        tried = 0

        def none_left() -> None:
            nonlocal tried
            tried += 1
            raise NoDescriptorsError("Too many open files")

        monkeypatch.setattr(engine._parts.cache, "trial", none_left)
        engine._parts.watch.failed(BROKEN)
        with trio.fail_after(SECONDS):
            while tried <= QUICK.errors + QUICK.trials:
                await trio.sleep(0.005)
            assert engine.status().disk == "unstable"  # neither bypassed nor healthy
            monkeypatch.setattr(engine._parts.cache, "trial", trial)
            while engine.status().disk != "healthy":
                await trio.sleep(0.005)


@pytest.mark.usefixtures("first_error_bypasses")
async def test_bytes_that_come_after_a_removal_have_nothing_fetched_ahead(tmp_path: Path) -> None:
    """Regression: the blob was taken into memory's books again, and stayed there."""
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine, ref)
        await reads(engine, blob, 0, CHUNK)
        state = engine._parts.catalog.state(blob)
        state.readahead = ReadAhead(state.shape, max_window=8 * CHUNK)
        bypass(engine)
        await engine.remove(str(ref))
        for chunk in range(4):
            engine._parts.reader._observe(state, ByteSpan(chunk * CHUNK, (chunk + 1) * CHUNK), stalled=True)
        assert not engine._parts.uncached._known

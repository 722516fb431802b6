"""Faults of the cache's disk under a running engine: no byte is wrong, nothing is lost or hangs, errors are clear."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.diskhealth import HealthRules
from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import BlobId, Policy, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine import committer, dropping, health, seal, uncached
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import CacheError, DiskFault, FailureKind, NoSpaceError, ReadError
from weightfs.store.cache import Cache
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Origin, OriginFile, open_origin
from weightfs.testing.published import CHUNK, bytes_asked, published_origin, sample

SIZE = 24 * CHUNK + 123
DATA = sample(SIZE)
QUICK = Limits(hold_base=0.05, hold_cap=0.2, backoff_base=0.01, backoff_cap=0.1)
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, limits=QUICK, commit_seconds=0.01)
SECONDS = 30


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (committer, dropping, seal):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(uncached, "REFUSAL_SECONDS", 0.02)
    monkeypatch.setattr(health, "RULES", HealthRules(merge=0.02, pause=0.02, calm=0.1, longest_calm=0.5))


@asynccontextmanager
async def opened(
    root: Path, settings: EngineSettings = LAZY
) -> AsyncIterator[tuple[Engine, Origin, Ref, BlobId]]:
    async with published_origin(DATA) as (origin, ref), running_engine(root, settings) as engine:
        blob = (await engine.add(ref)).entries[0].blob
        assert blob.shape.chunk_length == CHUNK
        with trio.fail_after(SECONDS):
            yield engine, origin, ref, blob.id


def data_file(root: Path, blob: BlobId) -> Path:
    return root / "blobs" / str(blob)


async def read_all(engine: Engine, blob: BlobId, step: int = CHUNK) -> None:
    for start in range(0, SIZE, step):
        span = ByteSpan(start, start + step).clamp(SIZE)
        assert await engine.read(blob, span) == DATA[span.start : span.stop]


async def half(engine: Engine, blob: BlobId) -> None:
    """Every other chunk is cached and durable."""
    for start in range(0, SIZE, 2 * CHUNK):
        await engine.read(blob, ByteSpan(start, start + 1))
    await engine.quiet()


def cut_to(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length)


def replace_by_zeros(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.rename(path)


def replace_by_short(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"short")
    other.rename(path)


def move_away(path: Path) -> None:
    path.rename(path.parent.parent / "away")


DAMAGES = {
    "cut to nothing": cut_to(0),
    "cut amid": cut_to(SIZE // 2),
    "deleted": Path.unlink,
    "moved away": move_away,
    "replaced by zeros": replace_by_zeros,
    "replaced by a short file": replace_by_short,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("first", [1, 0], ids=["hole first", "cached first"])
async def test_a_lost_file_is_made_again(tmp_path: Path, damage: Callable[[Path], None], first: int) -> None:
    """Regression: a worker wrote into the other file, or let a cut one grow, and readers were given zeros."""
    async with opened(tmp_path / "cache") as (engine, _, _, blob):
        await half(engine, blob)
        damage(data_file(tmp_path / "cache", blob))
        start = first * CHUNK
        assert await engine.read(blob, ByteSpan(start, start + CHUNK)) == DATA[start : start + CHUNK]
        await read_all(engine, blob)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_file_lost_amid_a_fill(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    settings = replace(LAZY, commit_bytes=2 * CHUNK)
    async with opened(tmp_path / "cache", settings) as (engine, _, ref, blob):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.complete, str(ref))
            while engine.blob_status(blob).present_bytes < SIZE // 3:
                await trio.lowlevel.checkpoint()
            damage(data_file(tmp_path / "cache", blob))
        assert engine.blob_status(blob).trust == Trust.VERIFIED
        await read_all(engine, blob)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_file_lost_between_the_start_and_its_first_use(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Regression: the first file that was opened in a session counted as the one that the start had looked at."""
    async with published_origin(DATA) as (_, ref):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await engine.complete(str(ref))
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            damage(data_file(tmp_path / "cache", blob))
            with trio.fail_after(SECONDS):
                await read_all(engine, blob)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_file_lost_before_a_clean_stop(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Regression: the stop took the look of the file that had been put in the place of the one that was read."""
    async with published_origin(DATA) as (_, ref):
        with contextlib.suppress(AssertionError):  # the check at the end sees that the file is gone or short
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                blob = (await engine.add(ref)).entries[0].blob.id
                await engine.complete(str(ref))
                await engine.quiet()
                damage(data_file(tmp_path / "cache", blob))
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            with trio.fail_after(SECONDS):
                await read_all(engine, blob)


async def test_verify_tells_of_a_lost_file_and_repairs_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await engine.complete(str(ref))
        data_file(tmp_path / "cache", blob).unlink()
        report = await engine.verify(str(ref), repair=False)
        assert not report.ok
        assert [chunk for _, chunk in report.bad] == list(range(25))
        await engine.complete(str(ref))
        data_file(tmp_path / "cache", blob).unlink()
        report = await engine.verify(str(ref), repair=True)
        assert report.ok
        assert report.repaired == 25
        await read_all(engine, blob)


async def test_a_link_in_place_of_the_file_is_refused_and_readers_get_their_bytes_past_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "cache") as (engine, _, _, blob):
        await half(engine, blob)
        path = data_file(tmp_path / "cache", blob)
        victim = tmp_path / "victim"
        victim.write_bytes(bytes(SIZE))
        path.unlink()
        path.symlink_to(victim)
        assert await engine.read(blob, ByteSpan(CHUNK, CHUNK + 9)) == DATA[CHUNK : CHUNK + 9]
        assert "symbolic link" in caplog.text
        assert engine.status().uncached_bytes >= CHUNK
        path.unlink()
        await until_kept(engine, blob)
        await read_all(engine, blob)
        assert victim.read_bytes() == bytes(SIZE)


async def until_kept(engine: Engine, blob: BlobId) -> None:
    """Read on, until everything of it is in the cache: a failure is remembered for the time of a hold."""
    while not engine.blob_status(blob).complete:
        assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        await trio.sleep(0.01)


class Failing:
    """A method of the cache that fails while `error` is set; `calls` counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, error: CacheError) -> None:
        self.error: CacheError | None = error
        self.calls = 0
        honest = getattr(Cache, method)

        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.error is not None:
                raise self.error
            return honest(*args, **kwargs)

        monkeypatch.setattr(Cache, method, call)


FULL = NoSpaceError("the cache cannot write the index: No space left on device")
BROKEN = DiskFault("the cache cannot write the index: Input/output error")


@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
async def test_commits_that_fail_end_a_pull_and_do_not_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: CacheError
) -> None:
    """Regression: what could not be recorded was dropped and fetched again, every few seconds, for ever."""
    monkeypatch.setattr(health, "RULES", HealthRules())  # a trial that goes well forgives
    settings = replace(LAZY, limits=replace(QUICK, hold_base=3600.0, hold_cap=3600.0))
    async with opened(tmp_path / "cache", settings) as (engine, origin, ref, blob):
        failing = Failing(monkeypatch, "commit", error)
        with pytest.raises(type(error), match="cannot be completed: the cache cannot write the index"):
            await engine.complete(str(ref))
        assert engine.status().trouble
        pulled = bytes_asked(origin)
        assert pulled <= 2 * SIZE
        for _ in range(100):
            await trio.sleep(0.001)
        assert bytes_asked(origin) == pulled
        for _ in range(3):  # past the cache, and once for all three
            assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        await engine.quiet()
        assert bytes_asked(origin) == pulled + SIZE
        assert engine.status().uncached_bytes == SIZE
        assert engine.blob_status(blob).present_bytes == 0
        failing.error = None


@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
async def test_after_commits_failed_everything_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: CacheError
) -> None:
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await half(engine, blob)
        failing = Failing(monkeypatch, "commit", error)
        with pytest.raises(type(error)):
            await engine.complete(str(ref))
        for start in range(0, SIZE, 2 * CHUNK):  # what is cached is served
            assert await engine.read(blob, ByteSpan(start, start + 9).clamp(SIZE)) == DATA[start : start + 9]
        failing.error = None
        await until_kept(engine, blob)
        await engine.complete(str(ref))
        await read_all(engine, blob)
        while engine.status().trouble:
            await trio.sleep(0.01)


async def test_verdicts_outlive_a_failed_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: `verified` was said once, and lost with the batch that said it."""
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        failing = Failing(monkeypatch, "commit", FULL)
        failing.error = None
        judged = committer.Committer.judged

        def judge(self: committer.Committer, blob: BlobId, trust: Trust) -> None:
            failing.error = FULL
            judged(self, blob, trust)

        monkeypatch.setattr(committer.Committer, "judged", judge)
        await engine.complete(str(ref))
        while not engine.status().trouble:
            await trio.sleep(0.01)
        failing.error = None
        while engine.status().trouble:
            await trio.sleep(0.01)
    cache = Cache.open(tmp_path / "cache", now=0)
    try:
        assert cache.progress(blob).trust is Trust.VERIFIED
    finally:
        cache.close()


async def test_a_drop_that_the_index_refuses_is_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the chunks stayed half dropped, so that nobody could ever fetch them again."""
    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        await engine.complete(str(ref))
        path = data_file(tmp_path / "cache", blob)
        with path.open("r+b") as file:
            file.seek(3 * CHUNK)
            file.write(b"rotten")
        failing = Failing(monkeypatch, "drop", FULL)
        with pytest.raises(ReadError) as caught:
            await engine.verify(str(ref), repair=True)
        assert caught.value.kind is FailureKind.NO_SPACE
        failing.error = None
        await until_kept(engine, blob)
        await read_all(engine, blob)


@pytest.mark.parametrize("policy", [Policy.PROVISIONAL, Policy.HOLD])
async def test_a_file_that_cannot_be_made_fails_pulls_and_reads_that_need_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """Regression: a pull, and a read under `hold`, waited for ever."""
    failing = Failing(monkeypatch, "prepare", FULL)
    async with opened(tmp_path / "cache", replace(LAZY, policy=policy, read_timeout=0)) as (
        engine,
        _,
        ref,
        blob,
    ):
        with pytest.raises(NoSpaceError):
            await engine.complete(str(ref))
        if policy is Policy.HOLD:
            with pytest.raises(ReadError) as caught:
                await engine.read(blob, ByteSpan(0, 1))
            assert caught.value.kind is FailureKind.NO_SPACE
        else:
            assert await engine.read(blob, ByteSpan(0, 9)) == DATA[:9]
        engine.opened(blob)
        failing.error = None
        assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA


async def test_sealing_that_cannot_go_on_ends_a_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightfs.engine.hashing import Hasher

    async def broken(*_: object, **__: object) -> None:
        raise DiskFault("the cache cannot be read")

    async with opened(tmp_path / "cache") as (engine, _, ref, blob):
        with monkeypatch.context() as patch:
            patch.setattr(Hasher, "hash", broken)
            with pytest.raises(DiskFault):
                await engine.complete(str(ref))
        await engine.complete(str(ref))
        await read_all(engine, blob)


async def test_what_was_hashed_before_a_crash_stays_suspect_when_the_rest_is_verified(tmp_path: Path) -> None:
    """Regression: a verdict cleared suspects that the running hash had taken in an earlier life."""
    async with published_origin(DATA) as (_, ref):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await engine.read(blob, ByteSpan(0, SIZE // 2))
            await engine.quiet()
            assert engine.status().refs[0].files[0].sealed_chunks > 2
            shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        with data_file(tmp_path / "crashed", blob).open("r+b") as file:
            file.seek(2 * CHUNK)
            file.write(b"rotten")
        async with running_engine(tmp_path / "crashed", LAZY) as engine:
            with trio.fail_after(SECONDS):
                await engine.complete(str(ref))
                assert engine.blob_status(blob).trust == Trust.VERIFIED
                await read_all(engine, blob)
                assert engine.status().disk_faults == 1


# ---- a real full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=700", "weightfs-test", str(where)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("workers", [0, 1])
async def test_a_full_disk_fails_pulls_and_no_reader_and_heals_when_there_is_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(uncached, "REFUSAL_SECONDS", 5.0)
    data = sample(30 * MIB, 3)
    patient = replace(
        QUICK, hold_base=1.0, hold_cap=1.0
    )  # else the fill is tried all the time, and slows the readers
    settings = replace(LAZY, workers=workers, commit_bytes=MIB, limits=patient)
    async with published_origin(data) as (_, ref), running_engine(small_disk, settings) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        with trio.fail_after(2 * SECONDS):
            with pytest.raises(NoSpaceError, match="free some space"):
                await engine.complete(str(ref))
            step = 8 * CHUNK
            for start in range(0, len(data), step):
                assert await engine.read(blob, ByteSpan(start, start + step)) == data[start : start + step]
            status = engine.status()
            assert "not kept" in status.trouble
            assert (status.disk, status.uncached_bytes) == ("healthy", len(data) - status.cache_bytes)
            subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
            while True:
                try:
                    await engine.complete(str(ref))
                except NoSpaceError:
                    await trio.sleep(0.05)
                else:
                    break
            assert engine.blob_status(blob).trust == Trust.VERIFIED
            assert await engine.read(blob, ByteSpan(0, len(data))) == data


@pytest.mark.parametrize("workers", [0, 1])
async def test_a_full_disk_has_the_least_recently_used_evicted_and_nobody_is_told(
    small_disk: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No limit is set: what the disk says itself is enough."""
    old, new = sample(7 * MIB, 4), sample(7 * MIB, 5)
    settings = replace(LAZY, workers=workers, commit_bytes=MIB)
    async with (
        open_origin({"/old": old, "/new": new}) as origin,
        running_engine(small_disk, settings) as engine,
    ):
        refs = [
            parse_ref(f"{origin.url(name)}#sha256={hashlib.sha256(data).hexdigest()}")
            for name, data in (("old", old), ("new", new))
        ]
        with trio.fail_after(2 * SECONDS):
            blobs = [(await engine.add(ref)).entries[0].blob.id for ref in refs]
            await engine.complete(str(refs[0]))
            await engine.complete(str(refs[1]))
            assert engine.blob_status(blobs[0]).present_bytes == 0
            assert engine.status().evicted_bytes == len(old)
            assert await engine.read(blobs[1], ByteSpan(0, len(new))) == new
            assert "cannot be fetched for now" not in caplog.text
            # And the other way round, for a reader.
            assert await engine.read(blobs[0], ByteSpan(0, len(old))) == old


async def test_an_index_that_is_full_once_has_something_evicted_and_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = sample(8 * CHUNK, 6)
    async with opened(tmp_path / "cache") as (engine, origin, ref, blob):
        origin.files["/old"] = OriginFile(old)
        other = (await engine.add(parse_ref(origin.url("old")))).entries[0].blob.id
        assert await engine.read(other, ByteSpan(0, len(old))) == old
        await engine.quiet()
        failing = Failing(monkeypatch, "commit", FULL)
        evicted: list[BlobId] = []
        evict = Cache.evict

        def noting(self: Cache, blob: BlobId, chunks: object = None) -> int | None:
            failing.error = None  # there is room now
            evicted.append(blob)
            return evict(self, blob, chunks)  # type: ignore[arg-type]

        monkeypatch.setattr(Cache, "evict", noting)
        await engine.complete(str(ref))
        assert evicted == [other]
        assert "cannot be fetched for now" not in caplog.text
        await read_all(engine, blob)

"""Regressions that a review found: what memory, index and planner believe of one blob stays the same belief."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import KIB, MIB, ByteSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine import committer
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import IntegrityError, ReadError
from weightfs.store.cache import Cache
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Origin, OriginFile, open_origin
from weightfs.testing.published import chunk_list, published_origin, sample

DATA = sample(4 * MIB)
SPOILT = bytes([DATA[0] ^ 1]) + DATA[1:]
TAG = '"one"'
LAZY = EngineSettings(
    workers=0, fill=FillMode.NEVER, readahead_bytes=0, limits=Limits(hold_base=0.05), commit_seconds=0.01
)
SECONDS = 30


def pinned(origin: Origin, data: bytes = DATA, path: str = "m.bin") -> Ref:
    """A ref with the digest of `data`; no chunk list."""
    return parse_ref(f"{origin.url(path)}#sha256={hashlib.sha256(data).hexdigest()}")


async def read(engine: Engine, blob: BlobId, *chunks: int) -> None:
    for chunk in chunks:
        assert await engine.read(blob, ByteSpan(chunk * MIB, (chunk + 1) * MIB)) == DATA[chunk * MIB :][:MIB]


async def settle(engine: Engine) -> None:
    """Everything that was read is durable, hashed as far as it goes in order, and recorded."""
    await engine.quiet()
    await engine._parts.committer.flush()


@asynccontextmanager
async def open_plain() -> AsyncIterator[tuple[Origin, Ref]]:
    async with open_origin({"/m.bin": DATA}) as origin:
        origin.files["/m.bin"] = OriginFile(DATA, etag=TAG)
        with trio.fail_after(SECONDS):
            yield origin, pinned(origin)


# ---- what was concluded from chunks goes with them


async def quarantines(cache: Path, ref: Ref, blob: BlobId) -> None:
    async with running_engine(cache, LAZY) as engine:
        with pytest.raises(IntegrityError, match="quarantined"):
            await engine.complete(str(ref))
        assert engine.blob_status(blob).trust == Trust.QUARANTINED


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "cut"])
async def test_other_bytes_below_a_saved_running_hash_are_not_verified(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """Regression: the running hash outlived the file, and wrong bytes that came in its stead were `verified`."""
    cache = tmp_path / "cache"
    async with open_plain() as (origin, ref):
        async with running_engine(cache, LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await read(engine, blob, 0, 1, 2)
            await settle(engine)
            assert engine._parts.cache.progress(blob).run is not None
        damage(cache / "blobs" / str(blob))
        origin.files["/m.bin"] = OriginFile(SPOILT, etag=TAG)
        await quarantines(cache, ref, blob)


async def test_a_kill_between_a_drop_and_the_next_commit(tmp_path: Path) -> None:
    """Regression: the drop was recorded, and that the running hash begins anew was not."""
    late = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, commit_seconds=3600)
    async with open_plain() as (origin, ref):
        async with running_engine(tmp_path / "cache", late) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await read(engine, blob, 0, 1, 2)
            await settle(engine)
            assert engine._parts.cache.progress(blob).run is not None
            await engine._parts.holdings.drop(engine._parts.catalog.state(blob), [0])
            shutil.copytree(tmp_path / "cache", tmp_path / "killed")
        origin.files["/m.bin"] = OriginFile(SPOILT, etag=TAG)
        await quarantines(tmp_path / "killed", ref, blob)


async def test_a_verified_blob_with_a_hole_is_proven_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    async with open_plain() as (_, ref):
        async with running_engine(cache, LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            await engine.complete(str(ref))
        (cache / "blobs" / str(blob)).unlink()
        async with running_engine(cache, LAZY) as engine:
            assert engine.blob_status(blob).trust == Trust.PROVISIONAL
            await engine.complete(str(ref))
            await read(engine, blob, 0, 1, 2, 3)
            assert engine.blob_status(blob).trust == Trust.VERIFIED


# ---- one shape


@pytest.mark.parametrize("chunk_length", [64 * KIB, 4 * MIB])
async def test_a_second_ref_brings_a_list_in_other_pieces(
    tmp_path: Path, chunk_length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: the index took the new chunk length, memory and planner kept the old one, and the engine died."""
    async with open_plain() as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(ref)).entries[0].blob
        origin.files["/b.bin"] = OriginFile(DATA)
        origin.files["/b.bin.meta4"] = OriginFile(
            chunk_list(DATA, [origin.url("b.bin")], chunk_length=chunk_length)
        )
        manifest = await engine.add(parse_ref(origin.url("b.bin")))
        assert manifest.entries[0].blob.id == blob.id
        assert manifest.entries[0].blob.shape != blob.shape
        assert "keeps its chunk length" in caplog.text
        await read(engine, blob.id, 3, 0)
        await engine.complete(str(ref))
        kept = engine._parts.cache.blob(blob.id)
        assert kept is not None
        assert kept.shape == engine._parts.catalog.state(blob.id).shape == blob.shape
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await read(engine, blob.id, 0, 1, 2, 3)


# ---- what a refresh brings


async def test_a_refresh_brings_a_new_validator(tmp_path: Path) -> None:
    """Regression: the same bytes had a new ETag, and every read failed until the next start."""
    async with open_plain() as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        await read(engine, blob, 0)
        origin.files["/m.bin"] = OriginFile(DATA, etag='"two"')
        with pytest.raises(ReadError):
            await read(engine, blob, 1)
        await engine.add(ref, refresh=True)
        assert [mirror.validator for mirror in engine._parts.catalog.state(blob).mirrors] == ['"two"']
        await read(engine, blob, 1, 2, 3)


def publish_list(origin: Origin) -> None:
    origin.files["/m.bin.meta4"] = OriginFile(chunk_list(DATA, [origin.url("m.bin")], chunk_length=MIB))


async def test_a_refresh_brings_a_list_that_refutes_a_chunk(tmp_path: Path) -> None:
    """Regression: the index dropped the chunk, memory went on serving it, and the blob was quarantined for good."""
    async with open_plain() as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        origin.files["/m.bin"] = OriginFile(SPOILT, etag=TAG)
        blob = (await engine.add(ref)).entries[0].blob.id
        await engine.read(blob, ByteSpan(0, 1))
        await read(engine, blob, 1)
        await settle(engine)
        origin.files["/m.bin"] = OriginFile(DATA, etag=TAG)
        publish_list(origin)
        await engine.add(ref, refresh=True)
        state = engine._parts.catalog.state(blob)
        assert state.trust is Trust.ATTESTED
        assert state.durable == engine._parts.cache.progress(blob).present
        await read(engine, blob, 0)
        await engine.complete(str(ref))
        assert engine.blob_status(blob).trust == Trust.VERIFIED


async def test_a_quarantined_blob_is_cured_by_a_trusted_list(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    async with open_plain() as (origin, ref), running_engine(cache, LAZY) as engine:
        origin.files["/m.bin"] = OriginFile(SPOILT, etag=TAG)
        blob = (await engine.add(ref)).entries[0].blob.id
        with pytest.raises(IntegrityError, match="quarantined"):
            await engine.complete(str(ref))
        origin.files["/m.bin"] = OriginFile(DATA, etag=TAG)
        publish_list(origin)
        await engine.add(ref, refresh=True)
        await engine.complete(str(ref))
        await read(engine, blob, 0, 1, 2, 3)
        await settle(engine)
        assert engine._parts.cache.progress(blob).trust is Trust.VERIFIED


async def test_a_list_that_refutes_nothing_keeps_what_is_cached(tmp_path: Path) -> None:
    async with open_plain() as (origin, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        await engine.complete(str(ref))
        publish_list(origin)
        await engine.add(ref, refresh=True)
        state = engine._parts.catalog.state(blob)
        assert (state.trust, state.generation, state.present.full) == (Trust.VERIFIED, 0, True)
        assert state.blob.chunk_list is not None


async def test_a_chunk_that_is_dropped_twice_at_once_counts_once(tmp_path: Path) -> None:
    """Regression: its bytes were subtracted from what is present for each time that it was named."""
    async with open_plain() as (_, ref), running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        await read(engine, blob, 0, 1)
        await engine._parts.holdings.drop(engine._parts.catalog.state(blob), [0, 0])
        assert engine.blob_status(blob).present_bytes == MIB


# ---- space that nobody names


@asynccontextmanager
async def open_moving(cache: Path) -> AsyncIterator[tuple[Engine, Origin, Ref, BlobId]]:
    """One version is cached, and the origin has another one."""
    async with open_origin({"/m.bin": DATA}) as origin, running_engine(cache, LAZY) as engine:
        with trio.fail_after(SECONDS):
            ref = parse_ref(origin.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob.id
            await read(engine, blob, 0, 1, 2, 3)
            origin.files["/m.bin"] = OriginFile(SPOILT)
            yield engine, origin, ref, blob


def files(cache: Path) -> set[str]:
    return {path.name for path in (cache / "blobs").iterdir()}


async def test_a_ref_that_moves_on_frees_what_it_was(tmp_path: Path) -> None:
    """Regression: nothing named the old version any more, and nothing could delete it."""
    cache = tmp_path / "cache"
    async with open_moving(cache) as (engine, _, ref, old):
        assert (await engine.add(ref, refresh=True)).entries[0].blob.id != old
        assert files(cache) == set()
        assert engine.status().cache_bytes == 0
        assert engine._parts.cache.orphans() == []


async def test_what_somebody_reads_is_freed_when_it_is_released(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    async with open_moving(cache) as (engine, _, ref, old):
        engine.opened(old)
        await engine.add(ref, refresh=True)
        await read(engine, old, 2)
        engine.released(old)
        while files(cache):
            await trio.sleep(0.001)
        assert engine._parts.catalog.get(old) is None


async def test_a_start_frees_what_no_ref_names(tmp_path: Path) -> None:
    """Regression: so did a removal that was cut short between the ref and its file."""
    cache = tmp_path / "cache"
    async with open_moving(cache) as (engine, _, ref, old):
        await settle(engine)
        shutil.copytree(cache, tmp_path / "killed")
    copy = await trio.to_thread.run_sync(lambda: Cache.open(tmp_path / "killed", now=1))
    copy.remove_ref(str(ref))
    copy.close()
    assert files(tmp_path / "killed") == {str(old)}
    async with running_engine(tmp_path / "killed", LAZY):
        assert files(tmp_path / "killed") == set()


# ---- a sync that fails once


async def test_one_failed_sync_costs_what_was_not_durable_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: chunks that nobody had fetched yet counted as lost, and each had to fail once before it was kept."""
    real, calls = os.fdatasync, iter(range(1_000_000))

    def fails_once(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.EIO, "injected")
        real(descriptor)

    data = sample(96 * 64 * KIB)
    settings = replace(LAZY, commit_bytes=8 * 64 * KIB, limits=Limits(hold_base=0.05, job_bytes=8 * 64 * KIB))
    async with published_origin(data) as (_, ref), running_engine(tmp_path / "cache", settings) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        monkeypatch.setattr(os, "fdatasync", fails_once)
        monkeypatch.setattr(committer, "RETRY_SECONDS", 0.01)
        state = engine._parts.catalog.state(blob)
        with trio.fail_after(SECONDS):
            await engine._parts.holdings.fill(state)
            while not state.sealed:
                await trio.sleep(0.001)
        assert next(calls) > 2
        assert await engine.read(blob, ByteSpan(0, len(data))) == data
        assert "landed before its file failed" not in caplog.text
        assert engine._parts.cache.doubt(blob) is None

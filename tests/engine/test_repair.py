"""What is wrong is fetched again, from elsewhere where that helps; and whose fault it was is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import trio

from weightfs.core.attribution import FaultCounts
from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.ref import parse_ref
from weightfs.engine.blobs import BlobState
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import IntegrityError, ReadError
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, open_origin
from weightfs.testing.published import CHUNK, published_origin, sample

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER)
DATA = sample(4 * MIB + 77)
SPOILT = DATA[: 2 * MIB + 5] + bytes([DATA[2 * MIB + 5] ^ 1]) + DATA[2 * MIB + 6 :]
DIGEST = hashlib.sha256(DATA).hexdigest()
SECONDS = 60
TAG = '"v1"'


def ref_of(origin: Origin, path: str) -> str:
    return f"{origin.url(path)}#sha256={DIGEST}"


async def quarantine(engine: Engine, ref: str) -> None:
    await engine.add(parse_ref(ref))
    with pytest.raises(IntegrityError, match="weightfs repair"):
        await engine.complete(ref)


async def test_a_quarantined_file_is_had_from_another_mirror_and_the_wrong_chunk_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_origin({"/bad.bin": SPOILT, "/good.bin": DATA}) as origin:
        bad, good = ref_of(origin, "bad.bin"), ref_of(origin, "good.bin")
        with trio.fail_after(SECONDS):
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                await quarantine(engine, bad)
            async with running_engine(tmp_path / "cache", LAZY) as engine:  # who gave what is recorded
                await engine.add(parse_ref(good))
                report = await engine.repair(bad)
                assert report.ok
                ((path, chunk, wrong_from, right_from),) = [
                    (found.path, found.chunk, found.wrong_from, found.right_from) for found in report.mended
                ]
                assert path.endswith("bad.bin")
                assert (chunk, wrong_from, right_from) == (2, origin.url("bad.bin"), origin.url("good.bin"))
                assert list(report.wrong.values()) == [FaultCounts(origin=2)]  # the whole, and the chunk
                blob = engine.manifests()[0].entries[0].blob
                assert engine.blob_status(blob.id).trust == Trust.VERIFIED
                assert await engine.read(blob.id, ByteSpan(0, len(DATA))) == DATA
                file = engine.status().refs[0].files[0]
                assert [mirror.wrong for mirror in file.mirrors] == [FaultCounts(origin=1), FaultCounts()]
                assert engine.blob_status(blob.id).faults == "wire=0 disk=0 origin=2"
    assert "chunk 2 of" in caplog.text
    assert "(fault of the origin)" in caplog.text


@pytest.mark.parametrize("mended", [False, True], ids=["from another mirror", "from one that was mended"])
async def test_reads_past_the_cache_do_not_give_what_was_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    """Neither what memory still has of the bad mirror, nor what it would fetch from there again."""
    span = ByteSpan(2 * MIB, 3 * MIB)
    async with open_origin({"/bad.bin": SPOILT, "/good.bin": DATA}) as origin:
        bad, good = ref_of(origin, "bad.bin"), ref_of(origin, "good.bin")
        origin.files["/bad.bin"] = OriginFile(SPOILT, etag=TAG)
        with trio.fail_after(SECONDS):
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                blob = (await engine.add(parse_ref(bad))).entries[0].blob
                state = engine._parts.catalog.get(blob.id)
                assert state is not None
                engine._parts.uncached.refused(state, "the cache is full")
                assert await engine.read(blob.id, span) == SPOILT[span.start : span.stop]
                await quarantine(engine, bad)
                if mended:
                    origin.files["/bad.bin"] = OriginFile(DATA, etag=TAG)
                else:
                    await engine.add(parse_ref(good))
                complete = engine._parts.upkeep.complete_file
                came: list[bytes] = []

                async def complete_file(path: str, state: BlobState) -> None:
                    engine._parts.uncached.refused(state, "the cache is full again")
                    came.append(await engine.read(blob.id, span))
                    await complete(path, state)

                monkeypatch.setattr(engine._parts.upkeep, "complete_file", complete_file)
                assert (await engine.repair(bad)).ok
                assert came == [DATA[span.start : span.stop]]


async def test_without_a_better_mirror_it_stays_quarantined_and_the_report_says_so(tmp_path: Path) -> None:
    async with open_origin({"/bad.bin": SPOILT}) as origin:
        bad = ref_of(origin, "bad.bin")
        with trio.fail_after(SECONDS):
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                await quarantine(engine, bad)
                report = await engine.repair(bad)
                assert not report.ok
                assert len(report.verified.quarantined) == 1
                assert not report.mended


async def test_an_origin_that_was_mended_is_enough(tmp_path: Path) -> None:
    async with open_origin({"/m.bin": SPOILT}) as origin:
        ref = ref_of(origin, "m.bin")
        origin.files["/m.bin"] = OriginFile(SPOILT, etag='"v1"')
        with trio.fail_after(SECONDS):
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                await quarantine(engine, ref)
                origin.files["/m.bin"] = OriginFile(DATA, etag='"v1"')
                report = await engine.repair(ref)
                assert report.ok
                assert [found.chunk for found in report.mended] == [2]


async def test_only_what_the_disk_spoilt_is_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_origin({"/m.bin": DATA}) as origin:
        ref = ref_of(origin, "m.bin")
        with trio.fail_after(SECONDS):
            async with running_engine(tmp_path / "cache", LAZY) as engine:
                blob = (await engine.add(parse_ref(ref))).entries[0].blob
                await engine.complete(ref)
                fetched = engine.status().fetched_bytes
                descriptor = os.open(tmp_path / "cache" / "blobs" / str(blob.id), os.O_RDWR)
                os.pwrite(descriptor, bytes([DATA[MIB] ^ 1]), MIB)
                os.close(descriptor)
                report = await engine.repair(ref)
                assert report.ok
                assert (report.verified.repaired, report.mended) == (1, ())
                assert list(report.wrong.values()) == [FaultCounts(disk=1)]
                assert engine.status().fetched_bytes == fetched + MIB
                assert engine.status().refs[0].wrong == FaultCounts(disk=1)
                again = await engine.repair(ref)
                assert (again.ok, again.verified.repaired) == (True, 0)


async def test_wrong_bytes_that_come_once_are_the_wires_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = sample(4 * CHUNK)
    with trio.fail_after(SECONDS):
        async with (
            published_origin(data) as (origin, ref),
            running_engine(tmp_path / "cache", LAZY) as engine,
        ):
            blob = (await engine.add(ref)).entries[0].blob
            origin.script("/m.bin", Fault(FaultKind.BIT_FLIP))
            assert await engine.read(blob.id, ByteSpan(0, CHUNK)) == data[:CHUNK]
            (status,) = engine.status().refs
            assert status.wrong == status.files[0].wrong == FaultCounts(wire=1)
            assert status.files[0].mirrors[0].wrong == FaultCounts(wire=1)
    assert "(fault of the wire)" in caplog.text


async def test_the_same_wrong_bytes_again_are_the_origins_fault(tmp_path: Path) -> None:
    data = sample(4 * CHUNK)
    with trio.fail_after(SECONDS):
        async with (
            published_origin(data) as (origin, ref),
            running_engine(tmp_path / "cache", LAZY) as engine,
        ):
            blob = (await engine.add(ref)).entries[0].blob
            tag = origin.files["/m.bin"].tag
            origin.files["/m.bin"] = OriginFile(b"x" + data[1:], etag=tag)
            with pytest.raises(ReadError, match="does not match its chunk list"):
                await engine.read(blob.id, ByteSpan(0, CHUNK))
            (status,) = engine.status().refs
            assert (status.wrong.wire, status.wrong.disk) == (0, 0)
            assert status.wrong.origin >= 2

"""Every fault of an origin through the whole engine: no wrong byte, a bounded wait, completion by an honest mirror."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, ReadError
from weightfs.sources.base import FetchSettings
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, open_origin
from weightfs.testing.published import CHUNK, bytes_asked, chunk_list, published_origin, sample
from weightfs.testing.waiting import eventually

COUNT = 10
SIZE = COUNT * CHUNK - 77
DATA = sample(SIZE)
LIMITS = Limits(backoff_base=0.005, backoff_cap=0.02, hold_base=60.0, max_retries=3, job_bytes=2 * CHUNK)
SETTINGS = EngineSettings(
    workers=0,
    fill=FillMode.NEVER,
    limits=LIMITS,
    fetch=FetchSettings(connect_timeout=2.0, timeout=0.2, stall_timeout=0.2, retry=0),
)
FILLING = replace(SETTINGS, fill=FillMode.OPENED)
SECONDS = 30

# How a fault ends where nobody is honest; None: the transfer is honest after all.
FAULTS: dict[str, tuple[Fault, set[FailureKind] | None]] = {
    "reset before the head": (Fault(FaultKind.RESET_BEFORE_HEAD), {FailureKind.RESET}),
    "reset amid the head": (Fault(FaultKind.RESET_MID_HEAD), {FailureKind.RESET}),
    "reset amid the body": (Fault(FaultKind.RESET_MID_BODY, after=CHUNK // 2), {FailureKind.RESET}),
    "end before the head": (Fault(FaultKind.CLOSE_BEFORE_HEAD), {FailureKind.RESET}),
    "not HTTP": (Fault(FaultKind.GARBAGE), {FailureKind.PROTOCOL}),
    "huge head": (Fault(FaultKind.HUGE_HEAD), {FailureKind.PROTOCOL}),
    "stall before the head": (Fault(FaultKind.STALL_BEFORE_HEAD), {FailureKind.TIMEOUT}),
    "stall before the body": (Fault(FaultKind.STALL_BEFORE_BODY), {FailureKind.STALL}),
    "stall amid the body": (Fault(FaultKind.STALL_MID_BODY, after=CHUNK // 2), {FailureKind.STALL}),
    "drip of the head": (Fault(FaultKind.DRIP_HEAD), {FailureKind.TIMEOUT}),
    "drip of the body": (Fault(FaultKind.DRIP_BODY), {FailureKind.STALL}),
    "short body": (Fault(FaultKind.SHORT_BODY, after=CHUNK // 2), {FailureKind.SHORT}),
    "over-long body": (Fault(FaultKind.LONG_BODY), None),
    "chunked": (Fault(FaultKind.CHUNKED), None),
    "chunked, short": (Fault(FaultKind.CHUNKED_SHORT), {FailureKind.SHORT, FailureKind.PROTOCOL}),
    "chunked, over-long": (Fault(FaultKind.CHUNKED_LONG), {FailureKind.PROTOCOL}),
    "other start": (Fault(FaultKind.WRONG_START), {FailureKind.PROTOCOL}),
    "other end": (Fault(FaultKind.WRONG_END), {FailureKind.PROTOCOL}),
    "other total": (Fault(FaultKind.WRONG_TOTAL), {FailureKind.CHANGED}),
    "range syntax": (Fault(FaultKind.BAD_RANGE_SYNTAX), {FailureKind.PROTOCOL}),
    "no Content-Range": (Fault(FaultKind.NO_CONTENT_RANGE), {FailureKind.PROTOCOL}),
    "no length": (Fault(FaultKind.NO_LENGTH), None),
    "wrong length": (Fault(FaultKind.WRONG_LENGTH), {FailureKind.PROTOCOL, FailureKind.SHORT}),
    "two lengths": (Fault(FaultKind.TWO_LENGTHS), {FailureKind.PROTOCOL}),
    "multipart": (Fault(FaultKind.MULTIPART), {FailureKind.PROTOCOL}),
    "gzip": (Fault(FaultKind.GZIP), {FailureKind.PROTOCOL}),
    "206 with a page": (Fault(FaultKind.HTML_206), {FailureKind.PROTOCOL, FailureKind.SHORT}),
    "200 with a page": (Fault(FaultKind.HTML_200), {FailureKind.PROTOCOL, FailureKind.CHANGED}),
    "401": (Fault(FaultKind.STATUS, status=401), {FailureKind.AUTH}),
    "403": (Fault(FaultKind.STATUS, status=403), {FailureKind.AUTH}),
    "404": (Fault(FaultKind.STATUS, status=404), {FailureKind.NOT_FOUND}),
    "410": (Fault(FaultKind.STATUS, status=410), {FailureKind.NOT_FOUND}),
    "408": (Fault(FaultKind.STATUS, status=408), {FailureKind.BUSY}),
    "425": (Fault(FaultKind.STATUS, status=425), {FailureKind.BUSY}),
    "429": (Fault(FaultKind.STATUS, status=429), {FailureKind.BUSY}),
    "500": (Fault(FaultKind.STATUS, status=500), {FailureKind.BUSY}),
    "502": (Fault(FaultKind.STATUS, status=502), {FailureKind.BUSY}),
    "503": (Fault(FaultKind.STATUS, status=503), {FailureKind.BUSY}),
    "504": (Fault(FaultKind.STATUS, status=504), {FailureKind.BUSY}),
    "416": (Fault(FaultKind.NOT_SATISFIABLE), {FailureKind.PROTOCOL}),
    "redirect loop": (Fault(FaultKind.REDIRECT, location="/m.bin"), {FailureKind.REDIRECT}),
    "redirect to another scheme": (
        Fault(FaultKind.REDIRECT, location="ftp://127.0.0.1/m.bin"),
        {FailureKind.REDIRECT},
    ),
    "redirect to nowhere": (Fault(FaultKind.REDIRECT, location=""), {FailureKind.REDIRECT}),
    "one bit": (Fault(FaultKind.BIT_FLIP), {FailureKind.MISMATCH}),
    "swapped": (Fault(FaultKind.SWAPPED), {FailureKind.MISMATCH}),
    "other file": (Fault(FaultKind.OTHER_FILE), {FailureKind.MISMATCH}),
    "zeros": (Fault(FaultKind.ZEROS), {FailureKind.MISMATCH}),
    "other ETag": (Fault(FaultKind.NEW_ETAG), {FailureKind.CHANGED}),
    "weak ETag": (Fault(FaultKind.WEAK_ETAG), None),
    "other size": (Fault(FaultKind.NEW_SIZE), {FailureKind.CHANGED}),
}
EVERY = pytest.mark.parametrize(("fault", "kinds"), FAULTS.values(), ids=FAULTS.keys())


@dataclass(frozen=True, slots=True)
class Stage:
    """An engine, a first mirror with faults, and a second one that is honest (or nobody)."""

    engine: Engine
    first: Origin
    second: Origin
    ref: Ref
    blob: BlobId

    async def check_everything(self) -> None:
        assert await self.engine.read(self.blob, ByteSpan(0, SIZE)) == DATA


def names(caplog: pytest.LogCaptureFixture, stage: Stage, kinds: set[FailureKind]) -> bool:
    """Whether a line of the log has the ref, the mirror at fault and what its fault was."""
    words = {f"({kind})" for kind in kinds} | (
        {"chunk list says"} if FailureKind.MISMATCH in kinds else set()
    )
    lines = [record.getMessage() for record in caplog.records]
    place = stage.first.url("m.bin")
    return any(str(stage.ref) in line and place in line and any(w in line for w in words) for line in lines)


@asynccontextmanager
async def staged(
    root: Path, fault: Fault, *, honest: bool, settings: EngineSettings = SETTINGS
) -> AsyncIterator[Stage]:
    async with open_origin({"/m.bin": DATA}) as second:
        more = [second.url("m.bin")] if honest else []
        async with (
            published_origin(DATA, mirrors=more) as (first, ref),
            running_engine(root, settings, calm=False) as engine,
        ):
            blob = (await engine.add(ref)).entries[0].blob
            assert len(blob.mirrors) == 1 + honest
            first.always["/m.bin"] = fault
            with trio.fail_after(SECONDS):
                yield Stage(engine, first, second, ref, blob.id)
                await engine.quiet()  # nothing is left in flight
                assert engine.check() == []


@EVERY
async def test_reads_with_one_honest_mirror(
    tmp_path: Path, fault: Fault, kinds: set[FailureKind] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "weightfs")
    async with staged(tmp_path / "cache", fault, honest=True) as stage:
        span = ByteSpan(CHUNK - 5, 2 * CHUNK + 5)
        assert await stage.engine.read(stage.blob, span) == DATA[span.start : span.stop]
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stage.check_everything)
        assert kinds is None or names(caplog, stage, kinds)


@EVERY
async def test_pulls_with_one_honest_mirror(
    tmp_path: Path, fault: Fault, kinds: set[FailureKind] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "weightfs")
    async with staged(tmp_path / "cache", fault, honest=True) as stage:
        await stage.engine.complete(str(stage.ref))
        assert stage.engine.blob_status(stage.blob).trust == Trust.VERIFIED
        await stage.check_everything()
        assert kinds is None or names(caplog, stage, kinds)


@EVERY
async def test_fills_with_one_honest_mirror(
    tmp_path: Path, fault: Fault, kinds: set[FailureKind] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody opened the file and reads nothing: it becomes whole, and is proven."""
    caplog.set_level("INFO", "weightfs")
    async with staged(tmp_path / "cache", fault, honest=True, settings=FILLING) as stage:
        stage.engine.opened(stage.blob)
        await eventually(lambda: stage.engine.blob_status(stage.blob).trust == Trust.VERIFIED)
        stage.engine.released(stage.blob)
        await stage.check_everything()
        assert kinds is None or names(caplog, stage, kinds)


@EVERY
async def test_fills_with_nobody_honest(
    tmp_path: Path, fault: Fault, kinds: set[FailureKind] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The fill gives up for the time of a hold and says so; it has kept nothing that is wrong, and goes on later."""
    caplog.set_level("INFO", "weightfs")
    settings = replace(FILLING, limits=replace(LIMITS, hold_base=0.1, hold_cap=0.1))
    async with staged(tmp_path / "cache", fault, honest=False, settings=settings) as stage:
        stage.engine.opened(stage.blob)
        if kinds is not None:
            await eventually(lambda: "cannot be fetched for now" in caplog.text)
            assert not stage.engine.blob_status(stage.blob).complete
            assert names(caplog, stage, kinds)
            stage.first.always.clear()
        await eventually(lambda: stage.engine.blob_status(stage.blob).trust == Trust.VERIFIED)
        await stage.check_everything()


@EVERY
async def test_with_nobody_honest(tmp_path: Path, fault: Fault, kinds: set[FailureKind] | None) -> None:
    """The read and the pull fail within their bounds, with the right kind; what is cached stays readable."""
    async with staged(tmp_path / "cache", fault, honest=False) as stage:
        stage.first.always.clear()
        assert await stage.engine.read(stage.blob, ByteSpan(0, 1)) == DATA[:1]
        stage.first.always["/m.bin"] = fault
        if kinds is None:
            await stage.engine.complete(str(stage.ref))
            await stage.check_everything()
            return
        with pytest.raises(ReadError) as caught:
            await stage.engine.read(stage.blob, ByteSpan(3 * CHUNK, 3 * CHUNK + 1))
        assert caught.value.kind in kinds
        with pytest.raises(ReadError) as caught:
            await stage.engine.complete(str(stage.ref))
        assert caught.value.kind in kinds
        assert await stage.engine.read(stage.blob, ByteSpan(0, CHUNK)) == DATA[:CHUNK]


async def test_a_pull_ends_when_faults_pass(tmp_path: Path) -> None:
    settings = replace(SETTINGS, limits=replace(LIMITS, max_retries=None, hold_base=0.05))
    async with staged(tmp_path / "cache", Fault(), honest=False, settings=settings) as stage:
        passing = [fault for fault, kinds in FAULTS.values() if kinds and not kinds & PERMANENT]
        stage.first.script("/m.bin", *passing)
        while True:
            try:
                await stage.engine.complete(str(stage.ref))
            except ReadError:  # a hold: what it says is remembered for a moment
                await trio.sleep(0.01)
            else:
                break
        await stage.check_everything()


PERMANENT = {FailureKind.AUTH, FailureKind.NOT_FOUND, FailureKind.CHANGED, FailureKind.REDIRECT}


async def test_one_bad_chunk_costs_one_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names ref, chunk, mirror, the expected and the actual digest."""
    bad = bytearray(DATA)
    bad[4 * CHUNK + 9] ^= 1
    async with staged(tmp_path / "cache", Fault(), honest=True) as stage:
        stage.first.files["/m.bin"] = OriginFile(bytes(bad), etag=stage.first.files["/m.bin"].tag)
        await stage.engine.complete(str(stage.ref))
        await stage.check_everything()
        asked = bytes_asked(stage.first) + bytes_asked(stage.second)
        assert asked <= SIZE + 1 + CHUNK  # one byte at the resolution
        assert stage.engine.status().mismatched_chunks == 1
    (line,) = [record.getMessage() for record in caplog.records if "chunk list says" in record.getMessage()]
    part = slice(4 * CHUNK, 5 * CHUNK)
    for word in (
        "chunk 4 ",
        str(stage.ref),
        stage.first.url("m.bin"),
        hashlib.sha256(DATA[part]).hexdigest(),
        hashlib.sha256(bad[part]).hexdigest(),
    ):
        assert word in line


async def test_without_an_honest_mirror_only_the_bad_chunk_fails(tmp_path: Path) -> None:
    bad = bytearray(DATA)
    bad[4 * CHUNK + 9] ^= 1
    async with staged(tmp_path / "cache", Fault(), honest=False) as stage:
        stage.first.files["/m.bin"] = OriginFile(bytes(bad), etag=stage.first.files["/m.bin"].tag)
        with pytest.raises(ReadError, match="chunk 4") as caught:
            await stage.engine.read(stage.blob, ByteSpan(0, SIZE))
        assert caught.value.kind is FailureKind.MISMATCH
        assert caught.value.chunk == 4
        for chunk in (0, 1, 2, 3, 5, 6, 7, 8):
            span = ByteSpan(chunk * CHUNK, (chunk + 1) * CHUNK)
            assert await stage.engine.read(stage.blob, span) == DATA[span.start : span.stop]
        with pytest.raises(ReadError, match="chunk 4"):
            await stage.engine.complete(str(stage.ref))


@pytest.mark.parametrize("listed", [True, False])
async def test_an_origin_without_ranges_is_streamed_once(tmp_path: Path, listed: bool) -> None:
    async with open_origin({"/m.bin": DATA}) as origin:
        if listed:
            origin.files["/m.bin.meta4"] = OriginFile(chunk_list(DATA, [origin.url("m.bin")]))
        origin.always["/m.bin"] = Fault(FaultKind.NO_RANGES)
        async with running_engine(tmp_path / "cache", SETTINGS) as engine:
            with trio.fail_after(SECONDS):
                ref = parse_ref(origin.url("m.bin"))
                blob = (await engine.add(ref)).entries[0].blob.id
                origin.seen.clear()
                span = ByteSpan(5 * CHUNK, 5 * CHUNK + 9)
                assert await engine.read(blob, span) == DATA[span.start : span.stop]
                await engine.complete(str(ref))
                assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        whole = [seen for seen in origin.requests("/m.bin") if "range" not in seen.headers]
        assert len(whole) == 1


@pytest.mark.parametrize("after", ["0", "100", "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_a_busy_origin_is_asked_again_when_it_said(tmp_path: Path, after: str) -> None:
    busy = Fault(FaultKind.STATUS, status=503, headers=(("Retry-After", after),))
    settings = replace(SETTINGS, read_timeout=SECONDS if after == "0" else 0.3)
    async with staged(tmp_path / "cache", Fault(), honest=False, settings=settings) as stage:
        stage.first.script("/m.bin", busy)
        stage.first.seen.clear()
        if after == "0":
            await stage.check_everything()
        else:
            with pytest.raises(ReadError) as caught:
                await stage.check_everything()
            assert caught.value.kind is FailureKind.TIMEOUT
            assert (
                len(stage.first.requests("/m.bin")) <= COUNT // 2
            )  # the ranges that were asked before it said so


async def test_versions_are_never_mixed(tmp_path: Path) -> None:
    """Without a digest, ETag and length pin the version: another one at the same URL is ESTALE, for good."""
    other = sample(SIZE, 9)
    async with (
        open_origin({"/m.bin": DATA}) as origin,
        running_engine(tmp_path / "cache", SETTINGS, calm=False) as engine,
    ):
        with trio.fail_after(SECONDS):
            ref = parse_ref(origin.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob
            assert engine.blob_status(blob.id).trust == Trust.UNVERIFIABLE
            origin.files["/m.bin"] = OriginFile(other)
            with pytest.raises(ReadError) as caught:
                await engine.read(blob.id, ByteSpan(0, SIZE))
            assert caught.value.kind is FailureKind.CHANGED
            with pytest.raises(ReadError):
                await engine.complete(str(ref))
            await engine.remove(str(ref))
            again = (await engine.add(ref)).entries[0].blob
            assert again.id != blob.id
            assert await engine.read(again.id, ByteSpan(0, SIZE)) == other

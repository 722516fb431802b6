"""The engine over a real cache and a real nginx, without a mount."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Blob, Manifest, Policy, Trust
from weightfs.core.metalink import write_metalink
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, ReadError
from weightfs.sources.base import FetchSettings
from weightfs.sources.publish import describe
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx

pytestmark = pytest.mark.nginx

SIZE = 12 * MIB + 12345
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER)


def blob_of(manifest: Manifest) -> Blob:
    return manifest.entries[0].blob


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def origin(tmp_path: Path, content: bytes) -> Iterator[Nginx]:
    root = tmp_path / "origin"
    root.mkdir()
    (root / "m.bin").write_bytes(content)
    with Nginx(root) as nginx:
        yield nginx


@pytest.fixture
def published(tmp_path: Path, origin: Nginx) -> Nginx:
    publish(tmp_path / "origin" / "m.bin", origin.url("m.bin"))
    return origin


def publish(path: Path, *urls: str) -> None:
    path.with_name(path.name + ".meta4").write_bytes(write_metalink(describe(path, list(urls))))


async def test_a_read_fetches_the_chunks_that_it_touches(
    tmp_path: Path, published: Nginx, content: bytes
) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = blob_of(await engine.add(parse_ref(published.url("m.bin"))))
        assert blob.size == SIZE
        published.forget_requests()
        span = ByteSpan(3 * MIB - 10, 3 * MIB + 10)
        assert await engine.read(blob.id, span) == content[span.start : span.stop]
        assert engine.blob_status(blob.id).present_bytes == 2 * MIB
        assert published.bytes_sent("m.bin") == 2 * MIB
        assert await engine.read(blob.id, ByteSpan(SIZE - 5, SIZE)) == content[-5:]


async def test_a_published_file_is_attested_then_verified(
    tmp_path: Path, published: Nginx, content: bytes
) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(published.url("m.bin"))
        blob = blob_of(await engine.add(ref))
        assert engine.blob_status(blob.id).trust == Trust.ATTESTED
        with trio.fail_after(30):
            await engine.complete(str(ref))
        status = engine.blob_status(blob.id)
        assert status.trust == Trust.VERIFIED
        assert status.complete
        assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content


async def test_sixty_four_readers_at_once(tmp_path: Path, published: Nginx, content: bytes) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = blob_of(await engine.add(parse_ref(published.url("m.bin"))))
        rng = random.Random(1)
        published.forget_requests()

        async def read(start: int) -> None:
            span = ByteSpan(start, start + 4096)
            assert await engine.read(blob.id, span) == content[span.start : span.stop]

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(64):
                    nursery.start_soon(read, rng.randrange(SIZE - 4096))
        assert published.bytes_sent("m.bin") <= SIZE


async def test_without_digest_or_list(tmp_path: Path, origin: Nginx, content: bytes) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(origin.url("m.bin"))
        blob = blob_of(await engine.add(ref))
        assert engine.blob_status(blob.id).trust == Trust.UNVERIFIABLE
        with trio.fail_after(30):
            await engine.complete(str(ref))
        assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content


async def test_everything_is_served_after_a_restart_without_the_origin(
    tmp_path: Path, published: Nginx, content: bytes
) -> None:
    ref = parse_ref(published.url("m.bin"))
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(ref)
        with trio.fail_after(30):
            await engine.complete(str(ref))
    published.stop()
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = blob_of(await engine.add(ref))
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED
        assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content


async def test_one_bad_chunk_is_taken_from_the_second_mirror(tmp_path: Path, content: bytes) -> None:
    bad = bytearray(content)
    bad[5 * MIB + 17] ^= 1
    for name, data in (("a", bytes(bad)), ("b", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.bin").write_bytes(data)
    with Nginx(tmp_path / "a") as first, Nginx(tmp_path / "b") as second:
        publish(tmp_path / "b" / "m.bin", first.url("m.bin"), second.url("m.bin"))
        shutil.copy(tmp_path / "b" / "m.bin.meta4", tmp_path / "a")
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ref = parse_ref(first.url("m.bin"))
            blob = blob_of(await engine.add(ref))
            with trio.fail_after(30):
                await engine.complete(str(ref))
            assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content
            assert engine.status().mismatched_chunks >= 1
        assert first.bytes_sent("m.bin") + second.bytes_sent("m.bin") <= SIZE + 3 * MIB


async def test_without_an_honest_mirror_one_chunk_fails_and_the_rest_is_read(
    tmp_path: Path, published: Nginx, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = blob_of(await engine.add(parse_ref(published.url("m.bin"))))
        with (tmp_path / "origin" / "m.bin").open("r+b") as file:
            file.seek(5 * MIB)
            file.write(bytes([content[5 * MIB] ^ 1]))
        with trio.fail_after(30), pytest.raises(ReadError) as caught:
            await engine.read(blob.id, ByteSpan(5 * MIB, 5 * MIB + 1))
        assert caught.value.kind in (FailureKind.MISMATCH, FailureKind.CHANGED)
        assert "chunk 5" in str(caught.value)


async def test_a_chunk_that_the_disk_lost_is_fetched_again_at_first_touch_after_an_unclean_stop(
    tmp_path: Path, published: Nginx, content: bytes
) -> None:
    ref = parse_ref(published.url("m.bin"))
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = blob_of(await engine.add(ref))
        with trio.fail_after(30):
            await engine.complete(str(ref))
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.quiet()
        shutil.copytree(tmp_path / "cache", tmp_path / "crashed")  # not closed: an unclean stop
    files = [
        path for path in (tmp_path / "crashed").rglob("*") if path.is_file() and path.stat().st_size == SIZE
    ]
    assert len(files) == 1
    with files[0].open("r+b") as file:
        file.seek(4 * MIB + 5)
        file.write(b"rotten")
    async with running_engine(tmp_path / "crashed", LAZY) as engine:
        for start in range(0, SIZE, MIB):
            span = ByteSpan(start, start + MIB).clamp(SIZE)
            assert await engine.read(blob.id, span) == content[span.start : span.stop]
        assert engine.status().disk_faults == 1


@pytest.mark.parametrize("workers", [0, 2])
async def test_fill_completes_what_was_opened(
    tmp_path: Path, published: Nginx, content: bytes, workers: int
) -> None:
    settings = EngineSettings(workers=workers, fill=FillMode.OPENED)
    async with running_engine(tmp_path / "cache", settings) as engine:
        blob = blob_of(await engine.add(parse_ref(published.url("m.bin"))))
        engine.opened(blob.id)
        with trio.fail_after(60):
            await engine.complete(str(parse_ref(published.url("m.bin"))))
        engine.released(blob.id)
        assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content


async def test_a_read_is_bounded_while_the_origin_is_away(tmp_path: Path, published: Nginx) -> None:
    settings = replace(LAZY, read_timeout=0.2, fetch=FetchSettings(connect_timeout=0.2))
    async with running_engine(tmp_path / "cache", settings, calm=False) as engine:
        blob = blob_of(await engine.add(parse_ref(published.url("m.bin"))))
        published.stop()
        with trio.fail_after(30), pytest.raises(ReadError) as caught:
            await engine.read(blob.id, ByteSpan(0, 1))
        assert caught.value.kind is FailureKind.TIMEOUT


async def test_retries_are_counted_when_they_are_limited(tmp_path: Path, published: Nginx) -> None:
    settings = replace(LAZY, limits=Limits(max_retries=2, backoff_base=0.01))
    async with running_engine(tmp_path / "cache", settings, calm=False) as engine:
        ref = parse_ref(published.url("m.bin"))
        await engine.add(ref)
        published.stop()
        with trio.fail_after(30), pytest.raises(ReadError) as caught:
            await engine.complete(str(ref))
        assert caught.value.kind is FailureKind.CONNECT


async def test_a_removed_ref_leaves_nothing(tmp_path: Path, published: Nginx) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(published.url("m.bin"))
        blob = blob_of(await engine.add(ref))
        await engine.read(blob.id, ByteSpan(0, 1))
        await engine.quiet()
        assert await engine.remove(str(ref)) > 0
        assert engine.manifests() == ()
        with pytest.raises(ReadError):
            await engine.read(blob.id, ByteSpan(0, 1))
        with pytest.raises(KeyError):
            await engine.remove(str(ref))


async def test_verify_finds_and_repairs_one_flipped_bit(
    tmp_path: Path, published: Nginx, content: bytes
) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(published.url("m.bin"))
        blob = blob_of(await engine.add(ref))
        with trio.fail_after(30):
            await engine.complete(str(ref))
        assert (await engine.verify(str(ref), repair=False)).ok
        path = next(p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size == SIZE)
        with path.open("r+b") as file:
            file.seek(7 * MIB)
            file.write(bytes([content[7 * MIB] ^ 4]))
        published.forget_requests()
        with trio.fail_after(30):
            report = await engine.verify(str(ref), repair=True)
        assert [chunk for _, chunk in report.bad] == [7]
        assert report.ok
        assert report.repaired == 1
        assert published.bytes_sent("m.bin") == MIB
        assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content


async def test_hold_gives_nothing_before_the_whole_is_verified(
    tmp_path: Path, origin: Nginx, content: bytes
) -> None:
    import hashlib

    digest = hashlib.sha256(content).hexdigest()
    settings = replace(LAZY, policy=Policy.HOLD)
    async with running_engine(tmp_path / "cache", settings) as engine:
        blob = blob_of(await engine.add(parse_ref(origin.url("m.bin") + "#sha256=" + digest)))
        assert engine.blob_status(blob.id).trust == Trust.PROVISIONAL
        with trio.fail_after(30):
            assert await engine.read(blob.id, ByteSpan(0, 10)) == content[:10]
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED


async def test_a_wrong_whole_digest_quarantines(tmp_path: Path, origin: Nginx) -> None:
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        ref = parse_ref(origin.url("m.bin") + "#sha256=" + "ab" * 32)
        blob = blob_of(await engine.add(ref))
        await engine.read(blob.id, ByteSpan(0, 10))
        from weightfs.errors import IntegrityError

        with trio.fail_after(30), pytest.raises(IntegrityError):
            await engine.complete(str(ref))
        assert engine.blob_status(blob.id).trust == Trust.QUARANTINED
        with pytest.raises(ReadError):
            await engine.read(blob.id, ByteSpan(0, 10))


async def test_headers_reach_the_origin_of_a_ref_that_was_added_to_a_running_engine(
    tmp_path: Path, content: bytes
) -> None:
    root = tmp_path / "origin"
    root.mkdir()
    (root / "m.bin").write_bytes(content)
    guard = 'if ($http_x_token != "secret") { return 403; }'
    settings = replace(LAZY, workers=1, fetch=FetchSettings(headers=(("X-Token", "secret"),)))
    with Nginx(root, server_config=guard) as nginx:
        async with running_engine(tmp_path / "cache", settings) as engine:
            blob = blob_of(await engine.add(parse_ref(nginx.url("m.bin"))))
            with trio.fail_after(30):
                assert await engine.read(blob.id, ByteSpan(0, 10)) == content[:10]

"""Blobs of which only git's SHA-1 is known: provisional, then hashed as git does when they are complete."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Blob, Policy, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine import seal
from weightfs.engine.engine import Engine
from weightfs.engine.running import GitSha1
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import IntegrityError, ReadError
from weightfs.testing.engines import running_engine
from weightfs.testing.repositories import MemoryRepository, git_sha1

K = 4096
REF = parse_ref("hf://org/name@main")
DATA = random.Random(5).randbytes(5 * K + 77)
LAZY = EngineSettings(
    workers=0, fill=FillMode.NEVER, readahead_bytes=0, limits=Limits(hold_base=0.05), commit_seconds=0.01
)
HOLD = replace(LAZY, policy=Policy.HOLD)
SECONDS = 30


async def added(engine: Engine) -> Blob:
    return (await engine.add(REF, headers=False)).entries[0].blob


async def complete(engine: Engine) -> None:
    with trio.fail_after(SECONDS):
        await engine.complete(str(REF))


@pytest.mark.parametrize("data", [b"", b"hello\n", DATA], ids=["empty", "small", "chunks"])
def test_the_hash_is_gits(data: bytes) -> None:
    running = GitSha1(len(data))
    for at in range(0, len(data), 1000):
        running.update(memoryview(data)[at : at + 1000])
    assert running.digest() == git_sha1(data)
    if data == b"hello\n":
        assert running.digest().hex() == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object`
    if shutil.which("git"):
        git = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True)
        assert git.stdout.decode().strip() == running.digest().hex()


@pytest.mark.parametrize("savable", [True, False])
@pytest.mark.parametrize("data", [b"", b"hello\n", DATA], ids=["empty", "small", "chunks"])
async def test_it_is_verified_when_it_is_complete(
    repository: MemoryRepository, tmp_path: Path, data: bytes, savable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "SAVABLE", savable)
    repository.push(REF, {"config.json": data}, chunk_length=K)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine)
        assert engine.blob_status(blob.id).trust == Trust.PROVISIONAL
        await complete(engine)
        status = engine.blob_status(blob.id)
        assert (status.trust, status.complete) == (Trust.VERIFIED, True)
        assert (status.sha256, status.digest) == ("", f"git-sha1:{git_sha1(data).hex()}")
        assert engine.backing(blob.id) is not None
        file = engine.status().refs[0].files[0]
        assert (file.digest, file.sealed_chunks) == (status.digest, file.chunk_count)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED
        assert await engine.read(blob.id, ByteSpan(0, len(data))) == data
        assert repository.asked == [str(REF)]


async def test_a_read_needs_its_chunk_only(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.push(REF, {"config.json": DATA}, chunk_length=K)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine)
        assert await engine.read(blob.id, ByteSpan(K, K + 10)) == DATA[K : K + 10]
        await engine.quiet()
        status = engine.blob_status(blob.id)
        assert (status.present_bytes, status.trust) == (K, Trust.PROVISIONAL)


async def test_wrong_bytes_from_the_origin_are_quarantined(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    manifest = repository.push(REF, {"config.json": DATA}, chunk_length=K)
    url = manifest.entries[0].blob.mirrors[0].url
    repository.contents[url] = DATA[:-1] + bytes([DATA[-1] ^ 1])
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = await added(engine)
        with pytest.raises(IntegrityError, match="quarantined"):
            await complete(engine)
        with pytest.raises(ReadError, match="quarantined"):
            await engine.read(blob.id, ByteSpan(0, 1))
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        assert engine.blob_status(blob.id).trust == Trust.QUARANTINED
        await engine.remove(str(REF))
        repository.contents[url] = DATA
        await added(engine)
        await complete(engine)
        assert await engine.read(blob.id, ByteSpan(0, len(DATA))) == DATA


async def test_a_bit_that_the_disk_lost_costs_its_chunk(repository: MemoryRepository, tmp_path: Path) -> None:
    manifest = repository.push(REF, {"config.json": DATA}, chunk_length=K)
    blob = manifest.entries[0].blob
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await added(engine)
        for chunk in range(blob.shape.chunk_count - 1):
            await engine.read(blob.id, ByteSpan(chunk * K, chunk * K + 1))
        await engine.quiet()
        with (tmp_path / "cache" / "blobs" / str(blob.id)).open("r+b") as file:
            file.seek(2 * K)
            file.write(bytes([DATA[2 * K] ^ 1]))
        await complete(engine)
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED
        assert await engine.read(blob.id, ByteSpan(0, len(DATA))) == DATA
        assert engine.status().disk_faults == 1


@pytest.mark.parametrize("rotten", [False, True])
async def test_a_kill_before_the_verdict(repository: MemoryRepository, tmp_path: Path, rotten: bool) -> None:
    """What was recorded before is hashed with the rest, from the disk; what the disk did not keep is found by it."""
    manifest = repository.push(REF, {"config.json": DATA}, chunk_length=K)
    blob = manifest.entries[0].blob
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await added(engine)
        await engine.read(blob.id, ByteSpan(0, 3 * K))
        await engine.quiet()
        shutil.copytree(tmp_path / "cache", tmp_path / "killed")
    if rotten:
        with (tmp_path / "killed" / "blobs" / str(blob.id)).open("r+b") as file:
            file.write(b"rot")
    async with running_engine(tmp_path / "killed", LAZY) as engine:
        assert engine.blob_status(blob.id).present_bytes == 3 * K
        await complete(engine)
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED
        assert engine.backing(blob.id) is not None  # nothing is left to be hashed again
        assert await engine.read(blob.id, ByteSpan(0, len(DATA))) == DATA


async def test_hold_waits_for_the_verdict_and_then_serves(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"config.json": DATA}, chunk_length=K)
    repository.gate = trio.Event()
    async with running_engine(tmp_path / "cache", HOLD) as engine:
        blob = await added(engine)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await engine.read(blob.id, ByteSpan(K, K + 5)))

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not got
                repository.gate.set()
        assert got == [DATA[K : K + 5]]
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED


async def test_hold_never_serves_what_is_not_gits(repository: MemoryRepository, tmp_path: Path) -> None:
    manifest = repository.push(REF, {"config.json": DATA}, chunk_length=K)
    repository.contents[manifest.entries[0].blob.mirrors[0].url] = bytes(len(DATA))
    async with running_engine(tmp_path / "cache", HOLD) as engine:
        blob = await added(engine)
        with trio.fail_after(SECONDS), pytest.raises(ReadError, match="quarantined"):
            await engine.read(blob.id, ByteSpan(0, 1))


async def test_workers_hash_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through real worker processes, over the wire; the bytes come from a file."""
    path = tmp_path / "config.json"
    path.write_bytes(DATA)
    repository = MemoryRepository()
    manifest = repository.push(REF, {"config.json": DATA}, chunk_length=K)
    blob = manifest.entries[0].blob
    placed = blob.with_mirrors((replace(blob.mirrors[0], url=f"file://{path}"),))
    repository._said[str(REF)] = replace(manifest, entries=(replace(manifest.entries[0], blob=placed),))
    monkeypatch.setattr("weightfs.engine.parts.open_source", repository.open_source)
    async with running_engine(tmp_path / "cache", replace(LAZY, workers=1)) as engine:
        await added(engine)
        await complete(engine)
        assert engine.blob_status(blob.id).trust == Trust.VERIFIED


async def test_two_digests_of_the_same_bytes_are_two_blobs(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    other = parse_ref("hf://org/other@main")
    repository.push(REF, {"a": DATA}, chunk_length=K)
    repository.push(other, {"a": DATA}, digest="sha256", chunk_length=K)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        for ref in (REF, other):
            await engine.add(ref)
            with trio.fail_after(SECONDS):
                await engine.complete(str(ref))
        digests = {engine.blob_status(m.entries[0].blob.id).digest for m in engine.manifests()}
        assert digests == {
            f"git-sha1:{git_sha1(DATA).hex()}",
            f"sha256:{hashlib.sha256(DATA).hexdigest()}",
        }

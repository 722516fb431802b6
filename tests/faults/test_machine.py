"""Faults of the machine around a running engine: its network, its clock, its descriptors. No byte is wrong or lost."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine import blobs
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, ReadError
from weightfs.sources.base import FetchSettings
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx
from weightfs.testing.published import CHUNK, chunk_list, published_origin, sample
from weightfs.testing.waiting import eventually

SIZE = 30 * CHUNK + 9
DATA = sample(SIZE)
SETTINGS = EngineSettings(
    workers=0,
    fill=FillMode.NEVER,
    limits=Limits(backoff_base=0.01, backoff_cap=0.05, hold_base=0.05, hold_cap=0.1),
    fetch=FetchSettings(connect_timeout=1.0, timeout=1.0, stall_timeout=0.5),
)
SECONDS = 10


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    root = tmp_path / "served"
    root.mkdir()
    (root / "m.bin").write_bytes(DATA)
    with Nginx(root) as server:
        (root / "m.bin.meta4").write_bytes(chunk_list(DATA, [server.url("m.bin")]))
        yield server


@pytest.mark.nginx
@pytest.mark.parametrize("fill", [FillMode.NEVER, FillMode.OPENED])
async def test_the_network_is_gone_and_comes_back(
    tmp_path: Path, nginx: Nginx, fill: FillMode, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads waits, and is served; what fills goes on by itself. Nobody is told an error."""
    caplog.set_level("INFO", "weightfs")
    async with running_engine(tmp_path / "cache", replace(SETTINGS, fill=fill)) as engine:
        blob = (await engine.add(parse_ref(nginx.url("m.bin")))).entries[0].blob.id
        nginx.pause()
        engine.opened(blob)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await engine.read(blob, ByteSpan(0, SIZE)))

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                if fill is FillMode.NEVER:
                    nursery.start_soon(read)
                await eventually(lambda: "(connect)" in caplog.text)
                nginx.resume()
            await eventually(lambda: engine.blob_status(blob).trust == Trust.VERIFIED)
            assert got == ([DATA] if fill is FillMode.NEVER else [])
            assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        engine.released(blob)


@pytest.mark.nginx
async def test_the_network_is_gone_for_longer_than_a_read_may_wait(tmp_path: Path, nginx: Nginx) -> None:
    async with running_engine(tmp_path / "cache", replace(SETTINGS, read_timeout=0.3)) as engine:
        blob = (await engine.add(parse_ref(nginx.url("m.bin")))).entries[0].blob.id
        assert await engine.read(blob, ByteSpan(0, CHUNK)) == DATA[:CHUNK]
        nginx.pause()
        with trio.fail_after(SECONDS), pytest.raises(ReadError, match="read-timeout") as caught:
            await engine.read(blob, ByteSpan(5 * CHUNK, 6 * CHUNK))
        assert caught.value.kind is FailureKind.TIMEOUT
        assert await engine.read(blob, ByteSpan(0, CHUNK)) == DATA[:CHUNK]
        nginx.resume()
        await engine.complete(nginx.url("m.bin"))


async def test_a_start_without_network(tmp_path: Path) -> None:
    """Whoever mounts is shown everything that is known, and nobody is asked: the index has it all."""
    async with published_origin(DATA) as (origin, ref):
        async with running_engine(tmp_path / "cache", SETTINGS) as engine:
            await engine.add(ref)
            await engine.complete(str(ref))
        origin.seen.clear()
        async with running_engine(tmp_path / "cache", SETTINGS) as engine:
            assert [manifest.ref for manifest in engine.manifests()] == [str(ref)]
            blob = (await engine.add(ref)).entries[0].blob.id
            assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        assert origin.seen == []


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Until the block ends no file and no socket can be opened: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.nginx
async def test_out_of_descriptors(tmp_path: Path, nginx: Nginx, caplog: pytest.LogCaptureFixture) -> None:
    """Regression: a fetch that could not open the cache file called the disk sick, and its readers got EIO."""
    caplog.set_level("INFO", "weightfs")
    async with running_engine(tmp_path / "cache", SETTINGS) as engine:
        blob = (await engine.add(parse_ref(nginx.url("m.bin")))).entries[0].blob.id
        assert await engine.read(blob, ByteSpan(0, 1)) == DATA[:1]
        got: list[bytes] = []

        async def read() -> None:
            got.append(await engine.read(blob, ByteSpan(0, SIZE)))

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                with no_descriptors():
                    nursery.start_soon(read)
                    await eventually(lambda: "raise the limit of open files" in caplog.text)
                    assert await engine.read(blob, ByteSpan(0, CHUNK)) == DATA[:CHUNK]
                    assert not got
        assert got == [DATA]


@pytest.mark.parametrize("cached", [True, False])
async def test_out_of_descriptors_before_the_file_is_open(
    tmp_path: Path, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: what was cached was dropped as if the disk had lost it, and its reader got EIO."""
    async with published_origin(DATA) as (origin, ref):
        async with running_engine(tmp_path / "cache", SETTINGS) as engine:
            await engine.add(ref)
            if cached:
                await engine.complete(str(ref))
        origin.seen.clear()
        async with running_engine(tmp_path / "cache", SETTINGS) as engine:
            blob = (await engine.add(ref)).entries[0].blob.id
            got: list[bytes] = []

            async def read() -> None:
                got.append(await engine.read(blob, ByteSpan(0, CHUNK)))

            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    with no_descriptors():
                        nursery.start_soon(read)
                        await eventually(lambda: caplog.text.count("trying again") >= 4)
                        assert not got
            assert got == [DATA[:CHUNK]]
        assert bool(origin.seen) is not cached


@pytest.mark.parametrize("years", [-40, 40])
async def test_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """A clock that is years away and put right: reads are bounded all the same, and ages count from the last use."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(blobs, "wall_clock", lambda: now[0])
    hour, year = 3600.0, 365 * 86400.0
    settings = replace(SETTINGS, max_age=hour, tidies=False, keep_pinned=False)
    async with published_origin(DATA) as (_, ref), running_engine(tmp_path / "cache", settings) as engine:
        blob = (await engine.add(ref)).entries[0].blob.id
        engine.opened(blob)
        now[0] += years * year
        with trio.fail_after(SECONDS):
            await engine.complete(str(ref))
        assert (await engine.gc()).freed_bytes == 0
        now[0] -= years * year
        assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA
        engine.released(blob)
        now[0] += hour / 2
        assert (await engine.gc()).freed_bytes == 0
        now[0] += hour
        assert (await engine.gc()).freed_bytes == SIZE
        assert await engine.read(blob, ByteSpan(0, SIZE)) == DATA

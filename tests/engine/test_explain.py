"""What a reader waits for, told by a real engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Policy
from weightfs.core.ref import parse_ref
from weightfs.engine.explain import CHUNKS_AT_MOST, WaitStatus
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import ReadError
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind
from weightfs.testing.published import CHUNK, published_origin, sample
from weightfs.testing.repositories import MemoryRepository

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER)
DATA = sample(20 * CHUNK + 5)
BOUND = 30.0


def told(wait: WaitStatus | None, state: str) -> WaitStatus:
    assert wait is not None
    assert {chunk.state for chunk in wait.chunks} == {state}, str(wait)
    return wait


async def test_a_read_and_its_fetch_are_told_with_ref_mirror_chunks_and_age(
    tmp_path: Path, repository: MemoryRepository
) -> None:
    ref = parse_ref("ollama://aya:8b")
    data = bytes(range(256)) * (12 * MIB // 256)
    repository.push(ref, {"m": data}, digest="sha256")
    repository.gate = trio.Event()
    with trio.fail_after(BOUND):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            blob = (await engine.add(ref)).entries[0].blob
            span = ByteSpan(3 * MIB, 4 * MIB + 1)
            told(engine.explain(blob.id, span), "unasked")
            assert engine.read_nowait(blob.id, span) is None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.read, blob.id, span)
                while not engine.fetches():  # its file is made in a thread first
                    await trio.sleep(0.001)
                wait = told(engine.explain(blob.id, span), "fetching")
                (fetch,) = engine.fetches()
                assert (fetch.first_chunk, fetch.last_chunk, fetch.bytes_left) == (3, 4, 2 * MIB)
                assert (fetch.priority, fetch.ref) == ("demand", "ollama://aya:8b")
                assert fetch.mirror.startswith("memory://")
                assert [chunk.job for chunk in wait.chunks] == [fetch.job] * 2
                assert {chunk.mirror for chunk in wait.chunks} == {fetch.mirror}
                assert wait.waiting_readers == 1
                for words in (
                    "ollama://aya:8b has 0 of 12 chunks",
                    "1 readers wait",
                    "chunk 3 fetching",
                    "memory://",
                ):
                    assert words in str(wait)
                assert "\n" not in str(wait)
                wide = engine.explain(blob.id, ByteSpan(0, 12 * MIB))
                assert wide is not None
                assert (len(wide.chunks), wide.left_out) == (CHUNKS_AT_MOST, 12 - CHUNKS_AT_MOST)
                assert f"{12 - CHUNKS_AT_MOST} more chunks" in str(wide)
                repository.gate.set()
            told(engine.explain(blob.id, span), "present")
            assert engine.read_nowait(blob.id, span) == data[span.start : span.stop]
            await engine.remove(str(ref))
            assert engine.explain(blob.id, span) is None
            assert engine.read_nowait(blob.id, span) is None
            assert engine.fetches() == ()


async def test_a_policy_that_lets_nobody_read_yet_is_what_stands_in_the_way(
    tmp_path: Path, repository: MemoryRepository
) -> None:
    ref = parse_ref("ollama://aya:8b")
    repository.push(ref, {"m": bytes(3 * MIB)}, digest="sha256")
    repository.gate = trio.Event()
    with trio.fail_after(BOUND):
        async with running_engine(tmp_path / "cache", replace(LAZY, policy=Policy.HOLD)) as engine:
            blob = (await engine.add(ref)).entries[0].blob
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.read, blob.id, ByteSpan(0, 1))
                while not engine.fetches():
                    await trio.sleep(0.001)
                wait = engine.explain(blob.id, ByteSpan(0, 1))
                assert wait is not None
                assert "policy hold lets nobody read it yet" in wait.obstacle
                assert wait.obstacle in str(wait)
                repository.gate.set()


async def test_why_a_chunk_is_given_up_and_for_how_long(tmp_path: Path) -> None:
    async with (
        published_origin(DATA) as (origin, ref),
        running_engine(tmp_path / "cache", LAZY, calm=False) as engine,
    ):
        blob = (await engine.add(ref, headers=False)).entries[0].blob
        origin.always["/m.bin"] = Fault(FaultKind.STATUS, status=404)
        with trio.fail_after(BOUND):
            with pytest.raises(ReadError):
                await engine.read(blob.id, ByteSpan(0, 1))
        wait = engine.explain(blob.id, ByteSpan(0, 1))
        assert wait is not None
        (chunk,) = wait.chunks
        assert chunk.state == "given up"
        assert chunk.rest is not None
        assert "404" in chunk.why
        assert "for another" in str(wait)

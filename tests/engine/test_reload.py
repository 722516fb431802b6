"""Settings that change while the engine runs: they count from then on, and nothing in flight is lost for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from weightfs.core.bandwidth import Timetable
from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Policy
from weightfs.core.ref import parse_ref
from weightfs.engine.engine import Engine
from weightfs.engine.origins import Origins
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, ReadError
from weightfs.sources.base import FetchSettings, Source
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import open_origin
from weightfs.testing.repositories import MemoryRepository

REF = parse_ref("ollama://aya:8b")
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, commit_seconds=0.01)
CHUNK = MIB // 4
SECONDS = 30


@asynccontextmanager
async def engine_with(
    repository: MemoryRepository, root: Path, settings: EngineSettings
) -> AsyncIterator[Engine]:
    repository.push(REF, {"m": os.urandom(MIB)}, chunk_length=CHUNK)
    async with running_engine(root / "cache", settings) as engine:
        await engine.add(REF, headers=False)
        with trio.fail_after(SECONDS):
            yield engine


async def test_a_fetch_that_is_held_back_goes_on_when_the_limit_is_lifted(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.piece = CHUNK
    slow = replace(LAZY, bandwidth=Timetable(((0, 1),)))
    async with engine_with(repository, tmp_path, slow) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.complete, str(REF))
        while not engine._parts.fetcher._pacing._pacer.waiting:
            await trio.sleep(0.01)
        assert await engine.reload(LAZY) == ()


async def test_a_smaller_cache_gives_way(repository: MemoryRepository, tmp_path: Path) -> None:
    async with engine_with(repository, tmp_path, LAZY) as engine:
        await engine.complete(str(REF))
        await engine.quiet()
        await engine.reload(replace(LAZY, max_bytes=MIB // 2))
        while engine.status().held_bytes > MIB // 2:
            await trio.sleep(0.01)
        assert engine.status().limit_bytes == MIB // 2


async def test_reads_that_begin_later_have_the_new_timeout(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.gate = trio.Event()
    async with engine_with(repository, tmp_path, LAZY) as engine:
        blob = engine.manifests()[0].entries[0].blob
        await engine.reload(replace(LAZY, read_timeout=0.05))
        with pytest.raises(ReadError, match="read-timeout") as caught:
            await engine.read(blob.id, ByteSpan(0, 1))
        assert caught.value.kind is FailureKind.TIMEOUT
        repository.gate.set()


async def test_what_may_not_change_is_named_and_stays(repository: MemoryRepository, tmp_path: Path) -> None:
    async with engine_with(repository, tmp_path, LAZY) as engine:
        wanted = replace(LAZY, workers=3, policy=Policy.STRICT, read_timeout=7.0)
        assert await engine.reload(wanted) == ("workers", "policy")
        assert engine.settings == replace(LAZY, read_timeout=7.0)


@pytest.mark.parametrize("workers", [0, 1])
async def test_another_token_is_sent_from_then_on(tmp_path: Path, workers: int) -> None:
    """By the resolver and by the workers, to the origins that had the old one."""
    data = os.urandom(MIB)
    async with open_origin({"/m.bin": data}) as origin:
        ref = parse_ref(origin.url("m.bin"))

        def settings(token: str) -> EngineSettings:
            return replace(LAZY, workers=workers, fetch=FetchSettings(headers=(("X-Token", token),)))

        async with running_engine(tmp_path / "cache", settings("old")) as engine:
            with trio.fail_after(SECONDS):
                await engine.add(ref, headers=False)
                await engine.reload(settings("new"))
                before = len(origin.requests("/m.bin"))
                await engine.complete(str(ref))
                assert {seen.headers["x-token"] for seen in origin.requests("/m.bin")[before:]} == {"new"}
                await engine.update(str(ref))
                assert origin.requests("/m.bin")[-1].headers["x-token"] == "new"


class Recorded:
    """A source that only says whether it is open."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.open = True

    async def aclose(self) -> None:
        self.open = False


async def test_an_old_source_is_closed_by_its_last_user() -> None:
    made: list[Any] = []

    async def make(_scheme: str, settings: FetchSettings) -> Source:
        await trio.lowlevel.checkpoint()
        made.append(Recorded(settings))
        return cast("Source", made[-1])

    first, second = FetchSettings(retry=1), FetchSettings(retry=2)
    origins = Origins(first, make)
    async with origins.using("https") as one, origins.using("https") as same:
        assert one is same
        await origins.change(second)
        async with origins.using("https") as other:
            assert made[1:] == [other]
        assert [source.open for source in made] == [True, True]
    assert [source.open for source in made] == [False, True]
    await origins.change(first)
    assert not made[1].open
    async with trio.open_nursery() as nursery:  # two at once, and a change amid it

        async def use() -> None:
            async with origins.using("https") as source:
                assert cast("Recorded", source).settings is second
                await trio.lowlevel.checkpoint()

        nursery.start_soon(use)
        nursery.start_soon(use)
        await trio.lowlevel.checkpoint()
        await origins.change(second)
    await origins.aclose()
    assert not any(source.open for source in made)

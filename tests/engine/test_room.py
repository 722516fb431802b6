"""Limits of the cache: never exceeded, the least recently used goes, never what is pinned or in use; no wrong byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from weightfs.core import plan
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine import blobs, room, uncached
from weightfs.engine.blobs import BlobState
from weightfs.engine.engine import Engine
from weightfs.engine.holdings import Holdings
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.status import CacheSpace
from weightfs.errors import CacheError, NoSpaceError, ReadError
from weightfs.store.cache import Cache
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, open_origin
from weightfs.testing.published import CHUNK, chunk_list, sample

COUNT = 16
SIZE = COUNT * CHUNK
NAMES = ("a", "b", "c", "d")
DATA = {name: sample(SIZE, seed) for seed, name in enumerate(NAMES)}
QUICK = Limits(hold_base=0.05, hold_cap=0.2, backoff_base=0.01, backoff_cap=0.1)
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, limits=QUICK, commit_seconds=0.01)
SECONDS = 30


class Clock:
    """The clock of last uses; moved by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(blobs, "wall_clock", made)
    monkeypatch.setattr(room, "SPACE_SECONDS", 0.05)
    monkeypatch.setattr(room, "AGE_SECONDS", 0.05)
    monkeypatch.setattr(uncached, "REFUSAL_SECONDS", 0.02)
    return made


@asynccontextmanager
async def models(listed: bool = True) -> AsyncIterator[tuple[Origin, dict[str, Ref]]]:
    """An origin with four models of sixteen chunks."""
    async with open_origin({f"/{name}": data for name, data in DATA.items()}) as origin:
        refs = {}
        for name, data in DATA.items():
            url = origin.url(name)
            origin.files[f"/{name}.meta4"] = OriginFile(chunk_list(data, [url], name=name))
            digest = hashlib.sha256(data).hexdigest()
            refs[name] = parse_ref(url if listed else f"{url}#sha256={digest}")
        yield origin, refs


async def add_all(engine: Engine, refs: dict[str, Ref]) -> dict[str, BlobId]:
    return {name: (await engine.add(ref, headers=False)).entries[0].blob.id for name, ref in refs.items()}


def state_of(engine: Engine, blob: BlobId) -> BlobState:
    return engine._parts.catalog.state(blob)


def on_disk(root: Path) -> int:
    total = 0
    for path in (root / "blobs").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is being evicted
            total += path.stat().st_blocks * 512
    return total


async def read(engine: Engine, ids: dict[str, BlobId], name: str, start: int = 0, stop: int = SIZE) -> None:
    assert await engine.read(ids[name], ByteSpan(start, stop)) == DATA[name][start:stop]


async def read_past(engine: Engine, ids: dict[str, BlobId], name: str) -> None:
    """There is no room: the reader gets its bytes all the same, and the cache does not keep them."""
    before, held = engine.status().uncached_bytes, engine.blob_status(ids[name]).present_bytes
    await read(engine, ids, name, 0, 9)
    assert engine.status().uncached_bytes > before
    assert engine.blob_status(ids[name]).present_bytes == held


async def read_until_kept(engine: Engine, ids: dict[str, BlobId], name: str) -> None:
    """A refusal is remembered for a moment."""
    while not engine.blob_status(ids[name]).complete:
        await read(engine, ids, name)
        await trio.sleep(0.01)


def cached(engine: Engine, ids: dict[str, BlobId]) -> str:
    return "".join(name for name, blob in ids.items() if engine.blob_status(blob).present_bytes)


@asynccontextmanager
async def engine_of(
    root: Path, refs: dict[str, Ref], **limits: object
) -> AsyncIterator[tuple[Engine, dict[str, BlobId]]]:
    async with running_engine(root, replace(LAZY, **limits)) as engine:  # type: ignore[arg-type]
        ids = await add_all(engine, refs)
        with trio.fail_after(SECONDS):
            yield engine, ids


# ---- the limit


async def test_the_limit_holds_on_the_disk_at_every_moment(tmp_path: Path) -> None:
    """Random readers and a fill of one open file; what the files take is looked at all the time."""
    limit = 24 * CHUNK
    root = tmp_path / "cache"
    most = held = 0
    async with (
        models() as (_, refs),
        engine_of(root, refs, max_bytes=limit, fill=FillMode.OPENED) as (engine, ids),
    ):
        engine.opened(ids["a"])

        async def watch() -> None:
            nonlocal most, held
            while True:
                most, held = max(most, on_disk(root)), max(held, engine.status().held_bytes)
                await trio.sleep(0)

        async def reader(seed: int) -> None:
            generator = random.Random(seed)
            for _ in range(25):
                name, start = generator.choice(NAMES), generator.randrange(SIZE)
                await read(engine, ids, name, start, min(SIZE, start + generator.randrange(1, 3 * CHUNK)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            async with trio.open_nursery() as readers:
                for seed in range(4):
                    readers.start_soon(reader, seed)
            nursery.cancel_scope.cancel()
        assert engine.status().evicted_bytes > 0
        engine.released(ids["a"])
    assert CHUNK < held <= limit
    # The filesystem counts a block of its own for a file in many pieces. (What docs/design.md allows beyond that, one
    # fetch window, is for workers that die.)
    assert CHUNK < most <= limit + len(NAMES) * 4096


async def test_the_least_recently_used_goes(tmp_path: Path, clock: Clock) -> None:
    async with (
        models() as (_, refs),
        engine_of(tmp_path / "cache", refs, max_bytes=3 * SIZE + 8 * CHUNK) as (engine, ids),
    ):
        for name in ("a", "b", "c"):
            clock.now += 10
            await read(engine, ids, name)
        await engine.quiet()
        clock.now += 10
        await read(engine, ids, "a", 5, 6)
        clock.now += 10
        await read(engine, ids, "d")
        assert cached(engine, ids) == "acd"
        clock.now += 10
        await read(engine, ids, "b")  # it is still listed, and is fetched again
        assert cached(engine, ids) == "abd"
        assert engine.status().evicted_bytes == 2 * SIZE
        assert engine.status().trouble == ""


async def test_of_a_file_that_was_never_whole_the_oldest_part_goes(tmp_path: Path, clock: Clock) -> None:
    async with (
        models() as (_, refs),
        engine_of(tmp_path / "cache", refs, max_bytes=16 * CHUNK) as (engine, ids),
    ):
        for chunk in range(12):
            clock.now += 10
            await read(engine, ids, "a", chunk * CHUNK, (chunk + 1) * CHUNK)
        await engine.quiet()
        clock.now += 10
        await read(engine, ids, "a", 0, CHUNK)
        ino = state_of(engine, ids["a"]).path.stat().st_ino
        clock.now += 10
        await read(engine, ids, "b", 0, 5 * CHUNK)
        kept = list(state_of(engine, ids["a"]).present)
        assert kept[0] == 0
        assert kept[1:] == list(range(kept[1], 12))
        assert kept[1] > 1
        assert state_of(engine, ids["a"]).path.stat().st_ino == ino  # holes were punched
        assert on_disk(tmp_path / "cache") <= 16 * CHUNK
        await read(engine, ids, "a", 0, 12 * CHUNK)


async def test_a_file_that_was_whole_goes_whole_and_comes_back_as_another(tmp_path: Path) -> None:
    """A mapping of the old file keeps every byte of it: it is an inode without a name."""
    async with (
        models() as (_, refs),
        engine_of(tmp_path / "cache", refs, max_bytes=SIZE + CHUNK) as (engine, ids),
    ):
        await engine.complete(str(refs["a"]))
        path = engine.backing(ids["a"])
        assert path is not None
        with path.open("rb") as old:
            await read(engine, ids, "b", 0, 2 * CHUNK)
            assert cached(engine, ids) == "b"
            assert engine.backing(ids["a"]) is None
            assert old.read() == DATA["a"]
            assert path.stat().st_ino != os.fstat(old.fileno()).st_ino
        await read(engine, ids, "a", 3, CHUNK)
        assert engine.blob_status(ids["a"]).trust != Trust.QUARANTINED
        await engine.complete(str(refs["a"]))
        assert engine.backing(ids["a"]) is not None
        await read(engine, ids, "a")


async def test_what_was_proven_binds_what_comes_after_an_eviction(tmp_path: Path) -> None:
    """Without any list: the digests that were proven are kept, and other bytes of the origin are refused."""
    async with models(listed=False) as (origin, refs):
        for name in NAMES:
            del origin.files[f"/{name}.meta4"]
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            blob = (await engine.add(refs["a"], headers=False)).entries[0].blob
            with trio.fail_after(SECONDS):
                await engine.complete(str(refs["a"]))
                await engine.quiet()
                state = state_of(engine, blob.id)
                assert await engine._parts.holdings.evict(state, None, lambda: True) == (SIZE, SIZE)
                assert not state.present
                honest = origin.files["/a"]
                origin.files["/a"] = replace(honest, data=bytes(SIZE), etag=honest.tag)
                with pytest.raises(ReadError):
                    await engine.read(blob.id, ByteSpan(0, 1))
                origin.files["/a"] = honest
                while True:
                    try:
                        await engine.complete(str(refs["a"]))
                    except (ReadError, CacheError):
                        await trio.sleep(0.01)
                    else:
                        break
                assert engine.blob_status(blob.id).trust == Trust.VERIFIED


async def next_look(engine: Engine) -> None:
    """Room has looked at everything once more."""
    engine._parts.room.poke()
    await trio.testing.wait_all_tasks_blocked()
    async with engine._parts.room._evicting:
        pass


# ---- who is exempt


async def test_a_refusal_is_told_until_something_fits_although_nobody_waits(tmp_path: Path) -> None:
    """What was told once nobody waited any more was taken back at once: an operator who looked saw nothing."""
    root = tmp_path / "cache"
    async with models() as (_, refs), engine_of(root, refs, max_bytes=SIZE) as (engine, ids):
        engine.opened(ids["a"])
        await read(engine, ids, "a")
        await read_past(engine, ids, "b")
        await next_look(engine)
        assert "pinned or in use" in engine.status().trouble
        engine.released(ids["a"])  # nobody is evicted, nobody asks: but now somebody could go
        while engine.status().trouble:
            await trio.sleep(0.01)
        assert cached(engine, ids) == "a"


async def test_what_could_never_fit_is_not_told_for_ever(tmp_path: Path) -> None:
    """A stream of everything that is larger than the cache: there is room for all others."""
    root = tmp_path / "cache"
    async with models() as (origin, refs), engine_of(root, refs, max_bytes=SIZE // 2) as (engine, ids):
        origin.always["/b"] = Fault(FaultKind.NO_RANGES)
        await read_past(engine, ids, "b")
        while engine.status().trouble:
            await trio.sleep(0.01)
        await read(engine, ids, "a", 0, 1)


async def test_pinned_and_open_files_stay_and_readers_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "cache"
    async with models() as (origin, refs), engine_of(root, refs, max_bytes=2 * SIZE) as (engine, ids):
        await engine.complete(str(refs["a"]))
        await engine.pin(str(refs["a"]), pinned=True)
        engine.opened(ids["b"])
        await read(engine, ids, "b")
        await read_past(engine, ids, "c")
        assert re.search(r"max-size.*pinned or in use", engine.status().trouble)
        assert re.search(r"max-size.*pinned or in use.*not kept", caplog.text)
        await next_look(engine)
        assert "max-size" in engine.status().trouble
        asked = len(origin.requests("/c"))
        assert cached(engine, ids) == "ab"
        await read(engine, ids, "a")  # what is there is served
        await read(engine, ids, "b")
        engine.released(ids["b"])
        await read_until_kept(engine, ids, "c")
        assert cached(engine, ids) == "ac"
        assert len(origin.requests("/c")) > asked
        while engine.status().trouble:
            await trio.sleep(0.01)
        await engine.pin(str(refs["a"]), pinned=False)
        await read(engine, ids, "d")
        assert "a" not in cached(engine, ids)


async def test_a_fill_larger_than_the_limit_pauses_and_says_so_and_a_pull_ends(tmp_path: Path) -> None:
    limit = 10 * CHUNK
    root = tmp_path / "cache"
    async with (
        models() as (origin, refs),
        engine_of(root, refs, max_bytes=limit, fill=FillMode.OPENED) as (engine, ids),
    ):
        await read(engine, ids, "b", 0, 4 * CHUNK)
        await engine.quiet()
        engine.opened(ids["a"])
        while not engine.status().trouble:
            await trio.sleep(0.01)
        await engine.quiet()
        assert cached(engine, ids) == "a"  # the other one went for it
        (file,) = next(ref for ref in engine.status().refs if ref.ref == str(refs["a"])).files
        assert "max-size" in file.error
        asked = len(origin.requests("/a"))
        with pytest.raises(NoSpaceError, match="max-size"):
            await engine.complete(str(refs["a"]))
        assert len(origin.requests("/a")) == asked  # its own head was not evicted for its tail
        present = list(state_of(engine, ids["a"]).present)
        await read(engine, ids, "a", 0, CHUNK)
        assert list(state_of(engine, ids["a"]).present) == present
        engine.released(ids["a"])
        await read(engine, ids, "b", 0, 9 * CHUNK)


async def test_an_origin_without_ranges_needs_room_for_the_whole(tmp_path: Path) -> None:
    """One stream of everything: nobody is evicted for one that could not fit anyway, and its reader is told."""
    root = tmp_path / "cache"
    async with models() as (origin, refs), engine_of(root, refs, max_bytes=SIZE + 4 * CHUNK) as (engine, ids):
        origin.always["/b"] = Fault(FaultKind.NO_RANGES)
        await read(engine, ids, "a")
        engine.opened(ids["a"])
        await engine._parts.holdings.prepare(state_of(engine, ids["c"]))
        await engine._parts.fetcher.wait_for(state_of(engine, ids["c"]), ChunkSpan(0, 3))
        await engine.quiet()
        await read_past(engine, ids, "b")
        assert cached(engine, ids) == "ac"
        engine.released(ids["a"])
        await read(engine, ids, "b", 0, 1)
        assert engine.status().held_bytes <= SIZE + 4 * CHUNK
        await read(engine, ids, "b")


async def test_fill_that_nobody_asked_for_evicts_nobody(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    async with (
        models() as (_, refs),
        engine_of(root, refs, max_bytes=SIZE + 4 * CHUNK, fill=FillMode.ALL) as (
            engine,
            ids,
        ),
    ):
        while "not fetched in the background" not in engine.status().trouble:
            await trio.sleep(0.01)
        assert engine.status().evicted_bytes == 0
        await engine.quiet()
        complete = [name for name, blob in ids.items() if engine.blob_status(blob).complete]
        assert len(complete) == 1
        await engine.complete(str(refs["d"]))  # somebody asks: now somebody goes
        assert engine.status().evicted_bytes > 0


async def test_a_pull_of_what_fits_has_others_evicted(tmp_path: Path) -> None:
    async with (
        models() as (_, refs),
        engine_of(tmp_path / "cache", refs, max_bytes=SIZE + 3 * CHUNK) as (engine, ids),
    ):
        for name in NAMES:
            await engine.complete(str(refs[name]))
            assert engine.blob_status(ids[name]).complete
        assert engine.status().evicted_bytes == 3 * SIZE


# ---- races


async def test_readers_who_race_with_evictions_get_the_bytes(tmp_path: Path) -> None:
    """Whole files and parts are evicted under readers without end: never a zero, never a wrong byte."""
    async with models() as (_, refs), engine_of(tmp_path / "cache", refs) as (engine, ids):
        done = 0

        async def reader(seed: int) -> None:
            nonlocal done
            generator = random.Random(seed)
            for _ in range(30):
                start = generator.randrange(SIZE)
                await read(engine, ids, "a", start, min(SIZE, start + generator.randrange(1, 4 * CHUNK)))
                done += 1

        async def evict() -> None:
            state = state_of(engine, ids["a"])
            generator = random.Random(99)
            while done < 120:
                part = None if generator.random() < 0.4 else generator.sample(range(COUNT), 5)
                await engine._parts.holdings.evict(
                    state, part, lambda: not engine._parts.planner.busy(state.id)
                )
                await trio.sleep(0)

        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(reader, seed)
            nursery.start_soon(evict)
        await engine.complete(str(refs["a"]))
        await read(engine, ids, "a")


@pytest.mark.parametrize("part", [None, [0, 1]], ids=["whole", "part"])
async def test_bytes_that_were_read_across_an_eviction_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: list[int] | None
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    honest = Cache.read
    seen: list[bytes] = []

    def slowly(self: Cache, blob: BlobId, span: ByteSpan) -> bytes:
        reading.set()
        go_on.wait(SECONDS)
        seen.append(honest(self, blob, span))
        return seen[-1]

    async with models() as (_, refs), engine_of(tmp_path / "cache", refs) as (engine, ids):
        state = state_of(engine, ids["a"])
        await engine._parts.holdings.prepare(state)
        await engine._parts.fetcher.wait_for(state, ChunkSpan(0, 3))
        await engine.quiet()
        monkeypatch.setattr(Cache, "read_nowait", lambda *_: None)
        monkeypatch.setattr(Cache, "read", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, engine, ids, "a", 0, 2 * CHUNK)
            await trio.to_thread.run_sync(reading.wait)
            room_of, _ = await engine._parts.holdings.evict(state, part, lambda: True)
            assert room_of >= 2 * CHUNK
            go_on.set()
        assert seen[0] == bytes(2 * CHUNK)  # the hole
        assert seen[-1] == DATA["a"][: 2 * CHUNK]


async def test_what_begins_amid_an_eviction_does_not_land_in_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that were never there are fetched while the file goes: they would be recorded of the new one."""
    evicting, go_on = threading.Event(), threading.Event()
    honest, mend = Cache.evict, Holdings.mend
    refused = trio.Event()

    def slowly(self: Cache, blob: BlobId, chunks: list[int] | None = None) -> int | None:
        evicting.set()
        go_on.wait(SECONDS)
        return honest(self, blob, chunks)

    async def noting(self: Holdings, state: BlobState, life: int) -> bool:
        refused.set()
        return await mend(self, state, life)

    monkeypatch.setattr(Holdings, "mend", noting)
    async with models() as (_, refs), engine_of(tmp_path / "cache", refs) as (engine, ids):
        state = state_of(engine, ids["a"])
        await engine._parts.holdings.prepare(state)
        await engine._parts.fetcher.wait_for(state, ChunkSpan(0, 3))  # without any read-ahead
        await engine.quiet()
        monkeypatch.setattr(Cache, "evict", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine._parts.holdings.evict, state, None, lambda: True)
            await trio.to_thread.run_sync(evicting.wait)
            # Read-ahead that was planned before does not look whether the file is prepared.
            engine._parts.fetcher.feed(plan.Want(state.id, ChunkSpan(8, 10)))
            while not refused.is_set() and 9 not in state.present:
                await trio.sleep(0.005)
            go_on.set()
        await read(engine, ids, "a")


async def test_an_eviction_that_the_index_refuses_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightfs.engine import dropping

    monkeypatch.setattr(dropping, "RETRY_SECONDS", 0.02)
    full = NoSpaceError("the index cannot grow")

    def refuse(*_: object) -> None:
        raise full

    async with models() as (_, refs), engine_of(tmp_path / "cache", refs) as (engine, ids):
        await engine.complete(str(refs["a"]))
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "evict", refuse)
            for part in (None, [0, 1]):
                assert await engine._parts.holdings.evict(state_of(engine, ids["a"]), part, lambda: True) == (
                    0,
                    0,
                )
        await read_until_kept(engine, ids, "a")


# ---- stops


@pytest.mark.parametrize("how", ["whole", "part"])
async def test_an_eviction_survives_a_crash(tmp_path: Path, how: str) -> None:
    async with models() as (_, refs):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ids = await add_all(engine, refs)
            with trio.fail_after(SECONDS):
                if how == "whole":
                    await engine.complete(str(refs["a"]))
                await read(engine, ids, "a", 0, 9 * CHUNK)
                await engine.quiet()
                state = state_of(engine, ids["a"])
                await engine._parts.holdings.evict(state, None if how == "whole" else [2, 3, 4], lambda: True)
                shutil.copytree(tmp_path / "cache", tmp_path / "crashed", copy_function=shutil.copy2)
        async with running_engine(tmp_path / "crashed", LAZY) as engine:
            ids = await add_all(engine, refs)
            state = state_of(engine, ids["a"])
            assert list(state.present) == ([] if how == "whole" else [0, 1, 5, 6, 7, 8])
            with trio.fail_after(SECONDS):
                await read(engine, ids, "a")


async def test_what_was_written_and_not_recorded_before_a_crash_takes_no_room(tmp_path: Path) -> None:
    async with models() as (_, refs):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ids = await add_all(engine, refs)
            with trio.fail_after(SECONDS):
                state = state_of(engine, ids["a"])
                await engine._parts.holdings.prepare(state)
                await engine._parts.fetcher.wait_for(state, ChunkSpan(0, 3))
                await engine.quiet()
                shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        with (tmp_path / "crashed" / "blobs" / str(ids["a"])).open("r+b") as file:
            file.seek(5 * CHUNK)
            file.write(os.urandom(6 * CHUNK))
        assert on_disk(tmp_path / "crashed") >= 9 * CHUNK
        async with running_engine(tmp_path / "crashed", LAZY) as engine:
            assert on_disk(tmp_path / "crashed") <= 3 * CHUNK + 4096
            with trio.fail_after(SECONDS):
                await read(engine, ids, "a")


async def test_the_room_of_a_removed_model_is_nobody_elses_before_its_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleting, go_on = threading.Event(), threading.Event()
    honest = Cache.delete_blobs

    def slowly(self: Cache, blobs: Collection[BlobId]) -> int:
        deleting.set()
        go_on.wait(SECONDS)
        return honest(self, blobs)

    monkeypatch.setattr(Cache, "delete_blobs", slowly)
    root, limit = tmp_path / "cache", SIZE + 4 * CHUNK
    async with models() as (_, refs), engine_of(root, refs, max_bytes=limit) as (engine, ids):
        await read(engine, ids, "a")
        await engine.quiet()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.remove, str(refs["a"]))
            await trio.to_thread.run_sync(deleting.wait)
            assert engine.status().limit_bytes == 4 * CHUNK
            await read(engine, ids, "b")
            assert 0 < engine.status().uncached_bytes <= SIZE
            assert on_disk(root) <= limit + 8192
            go_on.set()
        await read_until_kept(engine, ids, "b")


@pytest.mark.parametrize("clean", [True, False], ids=["clean stop", "crash"])
async def test_last_uses_survive_a_stop(tmp_path: Path, clock: Clock, clean: bool) -> None:
    async with models() as (_, refs):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ids = await add_all(engine, refs)
            with trio.fail_after(SECONDS):
                for name in ("b", "a", "c"):
                    clock.now += 1000
                    await engine.complete(str(refs[name]))
                clock.now += 1000
                await read(engine, ids, "b", 7, 8)
                await engine.quiet()
                if not clean:
                    await engine._parts.room.note_uses()
                    shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        root = tmp_path / ("cache" if clean else "crashed")
        async with running_engine(root, replace(LAZY, max_bytes=2 * SIZE + SIZE // 2)) as engine:
            with trio.fail_after(SECONDS):
                while engine.status().held_bytes > 2 * SIZE + SIZE // 2:
                    await trio.sleep(0.01)
            assert cached(engine, ids) == "bc"
            last = state_of(engine, ids["b"]).uses
            assert last.last == int(clock.now)
            assert min(last.times) == int(clock.now) - 3000


async def test_recording_uses_costs_no_commit_per_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    honest = Cache.note_uses

    def counting(self: Cache, times: dict[BlobId, tuple[int, ...]]) -> None:
        nonlocal calls
        calls += 1
        honest(self, times)

    monkeypatch.setattr(Cache, "note_uses", counting)
    async with models() as (_, refs), engine_of(tmp_path / "cache", refs) as (engine, ids):
        for _ in range(50):
            await read(engine, ids, "a")
            await trio.sleep(0.002)
        assert calls <= 1
    assert calls <= 2


# ---- age, gc, space


async def test_what_was_not_used_for_too_long_goes(tmp_path: Path, clock: Clock) -> None:
    async with models() as (_, refs), engine_of(tmp_path / "cache", refs, max_age=3600.0) as (engine, ids):
        await read(engine, ids, "a")
        engine.opened(ids["b"])
        await read(engine, ids, "b")
        await engine.quiet()
        clock.now -= 10_000  # back: nothing is too old
        for _ in range(20):
            await trio.sleep(0.01)
        assert cached(engine, ids) == "ab"
        clock.now += 10_000 + 3601
        await read(engine, ids, "c")
        while cached(engine, ids) != "bc":
            await trio.sleep(0.01)
        engine.released(ids["b"])  # that is a use of what the kernel reads by itself
        clock.now += 3000
        await read(engine, ids, "c", 0, 1)
        clock.now += 601
        while cached(engine, ids) != "c":
            await trio.sleep(0.01)


async def test_gc_says_what_it_would_do_and_does_it(tmp_path: Path, clock: Clock) -> None:
    async with models() as (_, refs):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ids = await add_all(engine, refs)
            with trio.fail_after(SECONDS):
                for name in NAMES:
                    clock.now += 100
                    await engine.complete(str(refs[name]))
            assert (await engine.gc()).evicted == ()  # no limits: nothing to do
            await engine.pin(str(refs["a"]), pinned=True)
        # The command alone: the loop would be quicker at times.
        limited = replace(LAZY, max_bytes=2 * SIZE, tidies=False)
        async with running_engine(tmp_path / "cache", limited) as engine:
            planned = await engine.gc(dry_run=True)
            assert [(one.ref, one.nbytes, one.whole) for one in planned.evicted] == [
                (str(refs["b"]), SIZE, True),
                (str(refs["c"]), SIZE, True),
            ]
            assert planned.freed_bytes == 2 * SIZE
            assert cached(engine, ids) == "abcd"
            done = await engine.gc()
            assert done.evicted == planned.evicted
            assert (done.freed_bytes, done.held_bytes, done.limit_bytes) == (2 * SIZE, 2 * SIZE, 2 * SIZE)
            assert cached(engine, ids) == "ad"


async def test_who_only_looks_evicts_nothing(tmp_path: Path, clock: Clock) -> None:
    async with models() as (_, refs):
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            ids = await add_all(engine, refs)
            with trio.fail_after(SECONDS):
                await engine.complete(str(refs["a"]))
        clock.now += 10_000
        settings = replace(LAZY, max_bytes=CHUNK, max_age=60.0, tidies=False)
        async with running_engine(tmp_path / "cache", settings) as engine:
            for _ in range(5):
                measured = engine._parts.room._measured
                while engine._parts.room._measured == measured:
                    await trio.sleep(0.01)
            assert cached(engine, ids) == "a"
            assert len((await engine.gc(dry_run=True)).evicted) == 1


async def test_the_filesystem_keeps_its_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Others fill the disk: the cache gives way, as far as it can."""
    total, others = 64 * SIZE, 0
    root = tmp_path / "cache"

    def look(self: room.Room) -> CacheSpace:
        return CacheSpace(total, total - others - on_disk(root))

    monkeypatch.setattr(room.Room, "_look_at_space", look)
    async with models() as (_, refs), engine_of(root, refs, min_free_bytes=4 * SIZE) as (engine, ids):
        for name in NAMES:
            clock.now += 10
            await read(engine, ids, name)
        await engine.quiet()
        assert engine.status().evicted_bytes == 0
        others = total - 7 * SIZE
        while len(cached(engine, ids)) != 2:
            await trio.sleep(0.01)
        assert cached(engine, ids) == "cd"
        engine.opened(ids["d"])
        others = total
        while "min-free" not in engine.status().trouble:
            await trio.sleep(0.01)
        await read_past(engine, ids, "a")
        monkeypatch.setattr(room, "SPACE_SECONDS", 1000.0)
        monkeypatch.setattr(room, "FRESH_SECONDS", 0.0)
        others = 0  # nobody looks at the disk before somebody would be refused
        await read(engine, ids, "a")
        engine.released(ids["d"])
        while engine.status().trouble:
            await trio.sleep(0.01)
        await read(engine, ids, "a")


def test_the_default_of_min_free() -> None:
    assert room.default_min_free(10 << 40) == 1 << 30
    assert room.default_min_free(20 << 20) == (20 << 20) // 100


async def test_a_disk_that_is_full_at_the_end_has_nobody_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: for the last chunks, which nobody would fetch again, other models were evicted."""
    async with models() as (_, refs):
        with trio.fail_after(SECONDS):
            async with running_engine(
                tmp_path / "cache", replace(LAZY, commit_seconds=3600), calm=False
            ) as engine:
                ids = await add_all(engine, refs)
                await read(engine, ids, "a")
                await engine.quiet()
                await read(engine, ids, "b", 0, 1)

                def full(*_: object, **__: object) -> None:
                    raise NoSpaceError("No space left on device")

                monkeypatch.setattr(engine._parts.cache, "commit", full)
            assert engine.status().evicted_bytes == 0
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            assert engine.blob_status(ids["a"]).complete
            await read(engine, ids, "b")

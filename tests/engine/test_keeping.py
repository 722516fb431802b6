"""Pinned refs are completed in the background, whatever the fill mode says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.ref import parse_ref
from weightfs.engine import keeping
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.status import FileStatus
from weightfs.errors import NoSpaceError
from weightfs.testing.engines import running_engine
from weightfs.testing.repositories import MemoryRepository

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, commit_seconds=0.01)
IDLE = replace(LAZY, keep_pinned=False)  # as a command on an idle cache is
REF = parse_ref("ollama://aya:8b")
OTHER = parse_ref("hf://org/other@main")
SECONDS = 30
A, B, C = b"a" * 5000, b"b" * 6000, b"c" * 7000


async def until_complete(engine: Engine, *paths: str) -> None:
    with trio.fail_after(SECONDS):
        while not all(one.trust == Trust.VERIFIED for one in files(engine) if one.path.endswith(paths)):
            await trio.sleep(0.01)


def files(engine: Engine) -> Sequence[FileStatus]:
    return [one for ref in engine.status().refs for one in ref.files]


def present(engine: Engine) -> int:
    return sum(one.present_bytes for one in files(engine))


async def test_a_pin_completes_what_is_there_and_what_comes(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"one": A, "two": B})
    repository.push(OTHER, {"three": b"x"})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        for ref in (REF, OTHER):
            await engine.add(ref, headers=False)
        await engine.quiet()
        assert present(engine) == 0
        await engine.pin(str(REF), pinned=True)
        await until_complete(engine, "one", "two")
        assert [(ref.ref, ref.pinned) for ref in engine.status().refs] == [
            (str(OTHER), False),
            (str(REF), True),
        ]
        repository.push(REF, {"one": A, "three": C})
        await engine.update(str(REF))
        await until_complete(engine, "8b/one", "8b/three")
        assert present(engine) == len(A) + len(C)


async def test_a_pin_outlives_the_process(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.push(REF, {"one": A})
    async with running_engine(tmp_path / "cache", IDLE) as engine:
        await engine.add(REF, headers=False)
        await engine.pin(str(REF), pinned=True)
    async with running_engine(tmp_path / "cache", IDLE) as engine:
        await engine.quiet()
        assert present(engine) == 0  # `weightfs ls` fetches nothing
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await until_complete(engine, "one")
        await engine.pin(str(REF), pinned=False)
        assert present(engine) == len(A)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        assert [ref.pinned for ref in engine.status().refs] == [False]
        with pytest.raises(KeyError):
            await engine.pin("ollama://other:latest", pinned=True)


BIG = bytes(range(256)) * 4096 * 40  # 40 MiB: more than is in flight at first


async def test_a_pin_that_is_taken_back_stops_the_fetching(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"one": BIG}, digest="sha256")
    repository.gate = trio.Event()
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF, headers=False)
        await engine.pin(str(REF), pinned=True)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await engine.pin(str(REF), pinned=False)
        repository.gate.set()
        await engine.quiet()
        assert 0 < present(engine) < len(BIG)
        assert not files(engine)[0].filling


@pytest.mark.parametrize("wanted_by", ["a handle", "a pull", "another pin"])
async def test_but_not_what_somebody_else_wants(
    repository: MemoryRepository, tmp_path: Path, wanted_by: str
) -> None:
    for ref in (REF, OTHER):
        repository.push(ref, {"one": BIG}, digest="sha256")
    repository.gate = trio.Event()
    async with running_engine(tmp_path / "cache", replace(LAZY, fill=FillMode.OPENED)) as engine:
        blob = (await engine.add(REF, headers=False)).entries[0].blob.id
        await engine.add(OTHER, headers=False)
        await engine.pin(str(REF), pinned=True)
        async with trio.open_nursery() as nursery:
            match wanted_by:
                case "a handle":
                    engine.opened(blob)
                case "a pull":
                    nursery.start_soon(engine.complete, str(REF))
                case _:
                    await engine.pin(str(OTHER), pinned=True)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await engine.pin(str(REF), pinned=False)
            assert files(engine)[0].filling
            repository.gate.set()
            await until_complete(engine, "one")
        assert engine.blob_status(blob).present_bytes == len(BIG)


async def test_removing_a_pinned_ref_takes_its_pin_along(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    for ref in (REF, OTHER):
        repository.push(ref, {"one": BIG}, digest="sha256")
    repository.gate = trio.Event()
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        for ref in (REF, OTHER):
            await engine.add(ref, headers=False)
        await engine.pin(str(REF), pinned=True)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await engine.remove(str(REF))
        repository.gate.set()
        await engine.quiet()
        assert present(engine) < len(BIG)
        repository.push(REF, {"one": A})
        await engine.add(REF, headers=False)
        assert [ref.pinned for ref in engine.status().refs] == [False, False]


async def test_what_the_disk_loses_of_a_pinned_ref_comes_back(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"one": BIG[: 3 * MIB]}, digest="sha256")
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        blob = (await engine.add(REF, headers=False)).entries[0].blob.id
        await engine.pin(str(REF), pinned=True)
        await until_complete(engine, "one")
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        with (tmp_path / "cache" / "blobs" / str(blob)).open("r+b") as file:
            file.write(b"rot")
        report = await engine.verify(str(REF), repair=False)
        assert len(report.bad) == 1
        await engine._parts.holdings.drop_bad(
            engine._parts.catalog.state(blob), [0]
        )  # as a reader who meets it does
        await until_complete(engine, "one")
        assert engine.blob_status(blob).present_bytes == 3 * MIB


async def test_a_full_disk_is_tried_again(
    repository: MemoryRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.push(REF, {"one": A})
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.01)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF, headers=False)
        prepare, failures = engine._parts.holdings.prepare, iter([NoSpaceError("the disk is full")] * 2)

        async def failing(state: object) -> bool:
            if error := next(failures, None):
                raise error
            return await prepare(state)  # type: ignore[arg-type]  # handed on as it came

        monkeypatch.setattr(engine._parts.holdings, "prepare", failing)
        await engine.pin(str(REF), pinned=True)
        await until_complete(engine, "one")


async def test_many_small_files_are_fetched_side_by_side(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    contents = {f"f{number}": b"%d" % number for number in range(60)}
    contents["again"] = b"7"  # one blob under two paths
    repository.push(OTHER, contents)
    repository.gate = trio.Event()
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(OTHER, headers=False)
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.complete, str(OTHER))
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert 8 <= repository.most_open <= 16
                repository.gate.set()
        assert {one.trust for one in files(engine)} == {Trust.VERIFIED}


assert len(BIG) == 40 * MIB


async def test_a_pause_holds_back_what_nobody_waits_for(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.push(REF, {"one": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        manifest = await engine.add(REF, headers=False)
        await engine.pause(str(REF), paused=True)
        await engine.pin(str(REF), pinned=True)
        await engine.quiet()
        assert present(engine) == 0
        blob = manifest.entries[0].blob
        assert await engine.read(blob.id, ByteSpan(0, 10)) == A[:10]
    async with running_engine(tmp_path / "cache", replace(LAZY, fill=FillMode.ALL)) as engine:
        assert [ref.paused for ref in engine.status().refs] == [True]
        await engine.pause(str(REF), paused=False)
        await until_complete(engine, "one")


async def test_a_pull_goes_on_through_a_pause(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.push(REF, {"one": A})
    repository.push(OTHER, {"two": B})
    async with running_engine(tmp_path / "cache", replace(LAZY, fill=FillMode.ALL)) as engine:
        await engine.pause_all(paused=True)
        for ref in (REF, OTHER):
            await engine.add(ref, headers=False)
        with trio.fail_after(SECONDS):
            await engine.complete(str(REF))
        await engine.quiet()
        assert present(engine) == len(A)
        assert engine.status().paused
    async with running_engine(tmp_path / "cache", replace(LAZY, fill=FillMode.ALL)) as engine:
        await engine.quiet()
        assert present(engine) == len(A)  # still paused
        await engine.pause_all(paused=False)
        await until_complete(engine, "two")


async def test_what_two_refs_name_is_paused_when_both_are(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"one": A})
    repository.push(OTHER, {"same": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        for ref in (REF, OTHER):
            await engine.add(ref, headers=False)
            await engine.pause(str(ref), paused=True)
        for ref in (REF, OTHER):
            await engine.pin(str(ref), pinned=True)
        await engine.quiet()
        assert present(engine) == 0
        await engine.remove(str(OTHER))
        await engine.add(OTHER, headers=False)  # anew: it is not paused
        await until_complete(engine, "one")


async def test_a_ref_has_a_mode_of_its_own(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.push(REF, {"one": A})
    repository.push(OTHER, {"two": B})
    async with running_engine(tmp_path / "cache", IDLE) as engine:
        for ref in (REF, OTHER):
            await engine.add(ref, headers=False)
        await engine.set_fill(str(REF), FillMode.ALL)
        await engine.quiet()
        assert present(engine) == 0  # a command on an idle cache only notes it
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await until_complete(engine, "one")
        await engine.quiet()
        assert present(engine) == len(A)
        assert [ref.fill for ref in engine.status().refs] == ["", "all"]
        with pytest.raises(KeyError):
            await engine.set_fill("ollama://other:latest", FillMode.ALL)
    async with running_engine(tmp_path / "cache", replace(LAZY, fill=FillMode.ALL)) as engine:
        await until_complete(engine, "two")
        repository.push(OTHER, {"two": C})
        await engine.set_fill(str(OTHER), FillMode.NEVER)
        await engine.update(str(OTHER))
        await engine.quiet()
        assert present(engine) == len(A)
        await engine.set_fill(str(OTHER), None)
        await until_complete(engine, "two")


async def test_an_open_file_is_filled_by_the_mode_of_its_ref(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, {"one": BIG})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        manifest = await engine.add(REF, headers=False)
        blob = manifest.entries[0].blob.id
        engine.opened(blob)
        await engine.quiet()
        assert not files(engine)[0].filling
        await engine.set_fill(str(REF), FillMode.OPENED)
        await until_complete(engine, "one")
        engine.released(blob)

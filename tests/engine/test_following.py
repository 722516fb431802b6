"""Refs that move: pinned to what they were at `add`, followed only when somebody asks for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.ref import parse_ref
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.status import Outcome
from weightfs.errors import FailureKind, ReadError, SourceError
from weightfs.sources.base import FetchSettings
from weightfs.testing.engines import running_engine
from weightfs.testing.repositories import MemoryRepository

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, commit_seconds=0.01)
REF = parse_ref("ollama://aya:8b")
SECONDS = 30
A, B, C = b"a" * 5000, b"b" * 6000, b"c" * 7000


async def outcome(engine: Engine, ref: str = str(REF)) -> Outcome:
    return (await engine.update(ref)).outcome


async def test_a_tag_is_followed_only_when_asked(repository: MemoryRepository, tmp_path: Path) -> None:
    first = repository.push(REF, {"m": A}, raw=b"first")
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF)
        second = repository.push(REF, {"m": B}, raw=b"second")
        assert (await engine.add(REF)) == first
        assert repository.asked == [str(REF)]
        found = await engine.update(str(REF))
        assert (found.ref, found.old_revision, found.new_revision) == (
            str(REF), first.revision, second.revision,
        )  # fmt: skip
        assert found.outcome is Outcome.UPDATED
        assert engine.manifests() == (second,)
        assert await outcome(engine) is Outcome.UNCHANGED
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        assert engine.manifests() == (second,)
        assert engine.refs()[0].previous == (first.revision,)


async def test_a_tag_that_goes_back_is_reported(
    repository: MemoryRepository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        repository.push(REF, {"m": A})
        await engine.add(REF)
        for data in (B, C, A, B):
            repository.push(REF, {"m": data})
            found.append(await outcome(engine))
        repository.push(REF, {"m": C})
        await engine.add(REF, refresh=True)  # as `pull --refresh` does
    assert found == [Outcome.UPDATED, Outcome.UPDATED, Outcome.ROLLED_BACK, Outcome.ROLLED_BACK]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len([record for record in warnings if "went back to an older digest" in record.message]) == 3


async def test_a_rollback_is_seen_after_a_restart(repository: MemoryRepository, tmp_path: Path) -> None:
    for data in (A, B):
        repository.push(REF, {"m": data})
        async with running_engine(tmp_path / "cache", LAZY) as engine:
            await engine.add(REF, refresh=True)
    repository.push(REF, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        assert await outcome(engine) is Outcome.ROLLED_BACK


async def test_what_only_the_old_one_had_goes_when_nobody_has_it_open(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    old = repository.push(REF, {"gone": A, "stays": C}).entries
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF)
        await engine.complete(str(REF))
        gone, stays = old[0].blob.id, old[1].blob.id
        engine.opened(gone)
        repository.push(REF, {"new": B, "stays": C})
        await engine.update(str(REF))
        assert await engine.read(gone, ByteSpan(0, len(A))) == A
        engine.released(gone)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(KeyError):
            engine.blob_status(gone)
        assert engine.blob_status(stays).trust == Trust.VERIFIED
        kept = {path.name for path in (tmp_path / "cache" / "blobs").iterdir()}
        assert (str(gone) in kept, str(stays) in kept) == (False, True)


async def test_an_origin_that_fails_leaves_everything_as_it_was(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    manifest = repository.push(REF, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF)
        repository.forget(REF)
        with pytest.raises(SourceError):
            await engine.update(str(REF))
        assert engine.manifests() == (manifest,)
        with pytest.raises(KeyError):
            await engine.update("ollama://other:8b")


async def test_what_is_removed_while_it_is_asked_for_stays_removed(
    repository: MemoryRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.push(REF, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF)
        asked, answer = trio.Event(), trio.Event()
        resolve = repository.resolve

        async def slow(ref: object) -> object:
            asked.set()
            await answer.wait()
            return await resolve(ref)  # type: ignore[arg-type]  # handed on as it came

        monkeypatch.setattr(repository, "resolve", slow)
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:

                async def update() -> None:
                    with pytest.raises(ReadError, match="was removed meanwhile"):
                        await engine.update(str(REF))

                nursery.start_soon(update)
                await asked.wait()
                await engine.remove(str(REF))
                answer.set()
        assert engine.manifests() == ()


async def test_the_case_of_an_ollama_name_does_not_matter(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    other = parse_ref("ollama://Aya:8B")
    first = repository.push(REF, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF)
        assert await engine.add(other) == first
        assert await engine.add(other, refresh=True) == first
        assert repository.asked == [str(REF)] * 2  # the spelling that is known is the one that is asked for
        second = repository.push(REF, {"m": B})
        assert await outcome(engine, str(other)) is Outcome.UPDATED
        await engine.complete(str(other))
        assert (await engine.verify(str(other), repair=False)).ok
        await engine.pin(str(other), pinned=True)
        assert [(stored.manifest, stored.pinned) for stored in engine.refs()] == [(second, True)]
        await engine.remove(str(other))
        assert engine.refs() == []


async def test_two_spellings_at_once_are_one_ref(repository: MemoryRepository, tmp_path: Path) -> None:
    other = parse_ref("ollama://AYA:8b")
    repository.push(REF, {"m": A})
    repository.push(other, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.add, REF)
            nursery.start_soon(engine.add, other)
        assert len(repository.asked) == 2
        assert len(engine.refs()) == 1
        (stored,) = engine.refs()
        assert engine._parts.cache.ref_names() == [stored.manifest.ref]
        first = repository._said[stored.manifest.ref]
        assert stored.manifest.tree == first.tree  # not at the other's place under this one's name


async def test_browsing_makes_a_ref_known(repository: MemoryRepository, tmp_path: Path) -> None:
    manifest = repository.push(REF, {"m": A})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.browse(REF)
        assert engine.manifests() == (manifest,)
        assert repository.most_open == 0


async def test_who_looks_at_a_path_does_not_send_the_configured_headers_to_a_host_of_his_choice(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    theirs, others = parse_ref("oci://evil.example/a/b"), parse_ref("ollama://evil.example/a/b")
    ours, beside = parse_ref("oci://registry.lan/a/b"), parse_ref("ollama://registry.lan/a/c")
    placed, implied = parse_ref("oci://placed.example/a/b"), REF
    for ref in (theirs, others, ours, beside, placed, implied):
        repository.push(ref, {"m": A})
    fetch = FetchSettings(
        headers=(("Authorization", "Bearer secret"),), endpoints=(("placed.example", "https://x.lan/y"),)
    )
    async with running_engine(tmp_path / "cache", replace(LAZY, fetch=fetch)) as engine:
        for ref in (theirs, others, ours):
            with pytest.raises(SourceError, match="weightfs add") as caught:
                await engine.browse(ref)
            assert caught.value.kind is FailureKind.AUTH
        assert repository.asked == []
        await engine.add(ours)
        for ref in (beside, placed, implied):  # to hosts that were named, or to none
            await engine.browse(ref)
    async with running_engine(tmp_path / "cache2", LAZY) as engine:
        await engine.browse(theirs)
        assert len(engine.refs()) == 1

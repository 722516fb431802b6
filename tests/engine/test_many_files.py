"""A ref of very many files: the loop has a turn after every few blobs, and what did not change costs nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from weightfs.app import memory
from weightfs.core import plan
from weightfs.core.ref import parse_ref
from weightfs.engine import keeping, turns
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.store.cache import Cache
from weightfs.store.index import Index, Txn
from weightfs.testing.engines import running_engine
from weightfs.testing.repositories import MemoryRepository
from weightfs.testing.waiting import eventually

LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, commit_seconds=0.01)
REF = parse_ref("hf://org/files@main")
OTHER = parse_ref("hf://org/other@main")
A_TIME = 8  # blobs a turn, instead of 256
FILES = {f"data/{number:03}.json": b"%d" % number for number in range(20 * A_TIME)}
SECONDS = 30


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "AT_A_TIME", A_TIME)


class Steps(trio.abc.Instrument):
    """The most events that the planner was fed between two moments at which others could run."""

    def __init__(self, engine: Engine) -> None:
        self.most = self.now = self.all = 0
        feed = engine._parts.planner.feed

        def counted(event: plan.Event, now: float) -> list[plan.Command]:
            self.now += 1
            self.all += 1
            return feed(event, now)

        engine._parts.planner.feed = counted  # type: ignore[method-assign]

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.most, self.now = max(self.most, self.now), 0


class Calls:
    """How often something is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.count = 0
        honest = getattr(owner, name)

        def counted(*args: Any, **named: Any) -> Any:
            self.count += 1
            return honest(*args, **named)

        monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables of the values that were written to the index."""
    written: list[str] = []
    put = Txn.put

    def noted(self: Txn, table: str, key: bytes, value: bytes) -> None:
        written.append(table)
        put(self, table, key, value)

    monkeypatch.setattr(Txn, "put", noted)
    return written


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: engine.add(REF, headers=False),
        lambda engine: engine.update(REF.text),
        lambda engine: engine.pause(REF.text, paused=True),
        lambda engine: engine.pause_all(paused=True),
        lambda engine: engine.set_fill(REF.text, FillMode.NEVER),
        lambda engine: engine.remove(REF.text),
    ],
    ids=["add", "update", "pause", "pause all", "fill", "remove"],
)
async def test_others_have_their_turn_after_every_few_blobs(
    repository: MemoryRepository, tmp_path: Path, change: Callable[[Engine], Any]
) -> None:
    repository.push(REF, FILES)
    repository.push(OTHER, {"one": b"x"})
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(OTHER, headers=False)
        steps = Steps(engine)
        if "add" not in change.__code__.co_names:
            await engine.add(REF, headers=False)
        trio.lowlevel.add_instrument(steps)
        steps.all = steps.now = 0
        await change(engine)
        trio.lowlevel.remove_instrument(steps)
        assert steps.most <= 4 * A_TIME  # a removal changes the capacity twice for each blob
        if not {"set_fill"} & set(change.__code__.co_names):
            assert steps.all >= len(FILES)


async def test_an_update_that_changes_nothing_writes_no_blob_and_asks_the_index_of_none(
    repository: MemoryRepository, tmp_path: Path, writes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.push(REF, FILES)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF, headers=False)
        assert writes.count("blob") == len(FILES)
        writes.clear()
        asked = Calls(monkeypatch, Cache, "progress")
        adopted = Calls(monkeypatch, engine._parts.holdings, "adopt")
        (before,) = engine.manifests()
        await engine.update(REF.text)
        assert engine.manifests()[0] is before
        assert writes == ["ref"]
        assert (asked.count, adopted.count) == (0, 0)
        repository.push(REF, FILES | {"data/000.json": b"new"})
        await engine.update(REF.text)
        assert writes.count("blob") == 1
        assert asked.count == 1


async def test_a_removal_takes_a_few_transactions(
    repository: MemoryRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.push(REF, FILES)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF, headers=False)
        transactions = Calls(monkeypatch, Index, "write")
        await engine.remove(REF.text)
        assert transactions.count <= 1 + 2 * (len(FILES) // A_TIME)
        assert engine.status().refs == ()


async def test_a_pinned_ref_has_a_few_files_made_at_a_time_and_all_are_fetched(
    repository: MemoryRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.push(REF, FILES)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        await engine.add(REF, headers=False)
        fill = engine._parts.holdings.fill
        now = most = 0

        async def counted(state: Any) -> None:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                await fill(state)
            finally:
                now -= 1

        monkeypatch.setattr(engine._parts.holdings, "fill", counted)
        await engine.pin(REF.text, pinned=True)
        with trio.fail_after(SECONDS):
            while not all(file.present_bytes for file in engine.status().refs[0].files):
                await trio.sleep(0.01)
        assert 1 < most <= keeping.FILES_AT_ONCE


async def test_a_survey_tells_first_of_files_with_news_and_counts_the_rest(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.push(REF, FILES)
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        manifest = await engine.add(REF, headers=False)
        last = manifest.entries[-1].blob.id
        engine.opened(last)
        (found,) = (await engine.survey(3)).refs
        assert [file.path.rpartition("/")[2] for file in found.files] == [
            "000.json",
            "001.json",
            f"{len(FILES) - 1}.json",
        ]
        assert found.files_left_out == len(FILES) - 3
        # What `opened` fetches has come, and nothing moves: the two are not of one moment.
        await eventually(lambda: engine.blob_status(last).complete, "the file that is open is fetched")
        await engine.quiet()
        (found,) = (await engine.survey()).refs
        assert (found,) == engine.status().refs
        assert engine.progress(REF.text) == (sum(map(len, FILES.values())), found.fetched_bytes)
        engine.released(last)


def test_what_a_long_look_of_the_collector_left_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callbacks = list(gc.callbacks)
    try:
        memory.keep_looks_short()
        frozen = gc.get_freeze_count()
        kept = [[number] for number in range(1000)]
        monkeypatch.setattr(memory, "LONG_LOOK", 3600.0)
        gc.collect()
        assert gc.get_freeze_count() <= frozen
        monkeypatch.setattr(memory, "LONG_LOOK", -1.0)
        gc.collect(1)
        assert gc.get_freeze_count() <= frozen
        gc.collect()
        assert gc.get_freeze_count() >= len(kept)
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.callbacks[:] = callbacks
        gc.unfreeze()

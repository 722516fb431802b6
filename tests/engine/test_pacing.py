"""Bandwidth limits on real fetches. Only lower bounds of time: a busy machine makes it longer, never shorter."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.bandwidth import BURST_SECONDS, Pacer, Timetable
from weightfs.core.geometry import MIB
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine import pacing
from weightfs.engine.pacing import Pacing
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.worker import PACE_BYTES
from weightfs.testing.engines import running_engine
from weightfs.testing.repositories import MemoryRepository

REF = parse_ref("ollama://aya:8b")
RATE = 2 * MIB
PACED = EngineSettings(
    workers=0, fill=FillMode.NEVER, readahead_bytes=0, limits=Limits(max_jobs=1, background_jobs=1),
    bandwidth=Timetable(((0, RATE),)),
)  # fmt: skip


async def seconds_to_complete(root: Path, settings: EngineSettings) -> float:
    async with running_engine(root, settings) as engine:
        await engine.add(REF, headers=False)
        began = trio.current_time()
        with trio.fail_after(30):
            await engine.complete(str(REF))
        return trio.current_time() - began


async def test_a_fetch_takes_its_time(repository: MemoryRepository, tmp_path: Path) -> None:
    repository.piece = 16 * 1024
    repository.push(REF, {"m": os.urandom(MIB)}, chunk_length=MIB // 4)
    # What is received before it is paid for, once by each job; there is one job a chunk at most.
    least = (MIB - 4 * PACE_BYTES) / RATE - BURST_SECONDS
    assert await seconds_to_complete(tmp_path / "overall", PACED) >= least > 0
    (url,) = repository.contents
    host = url.removeprefix("memory://")
    by_host = replace(PACED, bandwidth=None, host_bandwidth=((host, Timetable(((0, RATE),))),))
    assert await seconds_to_complete(tmp_path / "host", by_host) >= least


async def test_a_fetch_that_waits_for_its_turn_is_stopped_with_its_file(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    repository.piece = PACE_BYTES
    repository.push(REF, {"m": os.urandom(MIB)}, chunk_length=MIB // 4)
    one_byte = replace(PACED, bandwidth=Timetable(((0, 1),)))
    async with running_engine(tmp_path / "cache", one_byte) as engine:
        await engine.add(REF, headers=False)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.complete, str(REF))
                while not engine._parts.fetcher._pacing._pacer._waiting:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            await engine.remove(str(REF))


def test_files_and_other_hosts_are_not_paced() -> None:
    made = Pacing(Pacer(None, {"slow.example": Timetable(((0, 1),))}), lambda _: False, lambda _: None)
    assert made.begin(1, "https://slow.example:8443/m")
    assert not made.begin(2, "https://quick.example/m")
    everything = Pacing(Pacer(Timetable(((0, 1),)), {}), lambda _: False, lambda _: None)
    assert everything.begin(1, "https://quick.example/m")
    assert not everything.begin(2, "file:///srv/m")


async def test_a_step_of_the_timetable_is_noticed(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = 0
    monkeypatch.setattr(pacing, "minute_of_day", lambda: minute)
    gone: list[int] = []
    made = Pacing(Pacer(Timetable(((0, 1), (1, None))), {}), lambda _: False, gone.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        made.begin(1, "https://slow.example/m")
        made.pay(1, 10**9)
        made.pay(1, 1)  # and now decades of waiting
        await trio.sleep(1000)
        assert gone == [1]
        minute = 1
        await trio.sleep(pacing.LOOK_SECONDS)
        assert gone == [1, 1]
        made.end(1)
        made.pay(1, 1)
        assert gone == [1, 1]
        nursery.cancel_scope.cancel()


def test_other_limits_let_go_on_whoever_waits_once() -> None:
    """Regression: two that share a pacer told each other's jobs, too; the second word let one payment through."""
    pacer = Pacer(Timetable(((0, 1),)), {})
    gone: list[tuple[str, int]] = []
    one = Pacing(pacer, lambda _: False, lambda job: gone.append(("one", job)))
    other = Pacing(pacer, lambda _: False, lambda job: gone.append(("other", job)))
    for pacing_, job in ((one, 1), (other, 2)):
        pacing_.begin(job, "https://slow.example/m")
        pacer.pay(job, "slow.example", 10, urgent=False)
    for pacing_ in (one, other):
        pacing_.change(Pacer(None, {}))
    assert gone == [("one", 1), ("other", 2)]

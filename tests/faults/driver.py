"""Pulls one ref with two fetch workers, and kills itself at a named step: for test_crash.py and power.py.

    python driver.py CACHE REF STEP COUNT [--tally FILE] [--readers TRUTH] [--ask] [--swapped]

`STEP` is one of `STEPS`, or `never`; `COUNT` says at which passing of it. Prints one JSON line at the start (process id
and those of the workers), and one when it is done.

`--tally`: the bytes that are present are kept in this file of 8 bytes (little-endian), mapped by whoever asks.
`--readers`: the ref is filled in the background, while readers compare spans of it with the file `TRUTH`; a wrong byte
ends the process with status 3. `--ask`: at every passing of every step one JSON line, and one line is awaited.
`--swapped`: the order that must never be: the records first, the data's sync after them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine.committer import Committer
from weightfs.engine.dropping import Dropper
from weightfs.engine.engine import Engine, open_engine
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.seal import Sealer
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.sources.base import FetchSettings
from weightfs.store.cache import Cache
from weightfs.store.index import Index
from weightfs.store.sparse import SparseFiles

UNSETTLED = 8 * MIB
SETTINGS = EngineSettings(
    workers=2,
    fill=FillMode.NEVER,
    fetch=FetchSettings(),
    commit_bytes=2 * MIB,
    limits=Limits(unsettled_bytes=UNSETTLED, background_unsettled_bytes=6 * MIB),
)

# Name → (class, method, whether before it). In the order in which a chunk passes them.
STEPS: dict[str, tuple[type[Any], str, bool]] = {
    "file made": (SparseFiles, "prepare", False),
    "written, not told": (Fetcher, "handle", True),
    "told, not queued": (Holdings, "landed", True),
    "queued": (Holdings, "landed", False),
    "before the sync": (SparseFiles, "sync", True),
    "synced": (SparseFiles, "sync", False),
    "in the index": (Index, "write", False),
    "committed": (Cache, "commit", False),
    "believed durable": (Holdings, "committed", False),
    "judged": (Sealer, "_judge", False),
    "verdict queued": (Committer, "judged", False),
    "to be dropped": (Cache, "drop", True),
    "dropped": (Cache, "drop", False),
    "closing": (Cache, "close", True),
}


def arm(step: str, count: int) -> None:
    """Kill this process, and nothing more, at the `count`th passing of `step`."""
    if step == "never":
        return
    cls, name, before = STEPS[step]
    honest: Callable[..., Any] = getattr(cls, name)
    passed = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        result = None if before else honest(*args, **kwargs)
        passed += 1
        if passed >= count:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **kwargs) if before else result

    setattr(cls, name, patched)


def ask() -> None:
    """Hold at every passing of every step, until standard input has a line."""
    held = threading.Lock()

    def hold(step: str) -> None:
        with held:
            print(json.dumps({"step": step}), flush=True)
            if not sys.stdin.readline():
                os._exit(4)

    for step, (cls, name, before) in STEPS.items():
        setattr(cls, name, holding(getattr(cls, name), step, hold, before=before))


def holding(
    honest: Callable[..., Any], step: str, hold: Callable[[str], None], *, before: bool
) -> Callable[..., Any]:
    def patched(*args: Any, **kwargs: Any) -> Any:
        if before:
            hold(step)
        result = honest(*args, **kwargs)
        if not before:
            hold(step)
        return result

    return patched


def tell(tally: Path) -> None:
    """Keep `tally` at the bytes that are present. It is lowered before chunks are dropped, never after."""
    with tally.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 8)
    landed, drop = Holdings.landed, Dropper.drop

    def put(count: int) -> None:
        shared[:] = count.to_bytes(8, "little")

    def told_landed(self: Holdings, state: Any, *rest: Any) -> None:
        landed(self, state, *rest)
        put(state.present_bytes)

    async def told_drop(self: Dropper, owed: Any) -> None:
        put(owed.state.present_bytes - sum(len(owed.state.shape.span_of(chunk)) for chunk in owed.chunks))
        await drop(self, owed)

    setattr(Holdings, "landed", told_landed)  # noqa: B010 - a method, of which mypy would not hear
    setattr(Dropper, "drop", told_drop)  # noqa: B010


def swap() -> None:
    """Records are committed, and only then are the data files synced."""
    sync, commit = SparseFiles.sync, Cache.commit
    late: list[BlobId] = []

    def swapped(self: Cache, landings: Sequence[Any], **rest: Any) -> None:
        commit(self, landings, **rest)
        for blob in late:
            sync(self._files, blob)
        late.clear()

    setattr(SparseFiles, "sync", lambda _, blob: late.append(blob))  # noqa: B010
    setattr(Cache, "commit", swapped)  # noqa: B010


async def read_on(engine: Engine, blob: BlobId, truth: bytes) -> None:
    """Read spans from anywhere, for ever; what differs from the truth ends the process."""
    chance = random.Random()
    while True:
        start = chance.randrange(len(truth))
        span = ByteSpan(start, start + chance.randrange(1, 2 * MIB)).clamp(len(truth))
        if await engine.read(blob, span) != truth[span.start : span.stop]:
            print(json.dumps({"wrong": [span.start, span.stop]}), flush=True)
            os._exit(3)
        await trio.sleep(0.005)  # a read of what is there need not yield: the pull wants its turn


async def main(root: Path, text: str, step: str, count: int, options: argparse.Namespace) -> None:
    cache = Cache.open(root, now=int(time.time()))
    settings = SETTINGS
    if options.readers:
        settings = dataclasses.replace(SETTINGS, fill=FillMode.OPENED)
    if options.swapped:
        swap()
    if options.tally:
        tell(options.tally)
    arm(step, count)
    if options.ask:
        ask()
    try:
        async with open_engine(cache, settings) as engine:
            while len(engine.status().worker_pids) < 2:
                await trio.sleep(0.01)
            print(json.dumps({"pid": os.getpid(), "workers": engine.status().worker_pids}), flush=True)
            ref = parse_ref(text)
            manifest = await engine.add(ref)
            async with trio.open_nursery() as nursery:
                if options.readers:
                    truth = options.readers.read_bytes()
                    for _ in range(3):
                        nursery.start_soon(read_on, engine, manifest.entries[0].blob.id, truth)
                await engine.complete(str(ref))
                state = engine._parts.catalog.state(manifest.entries[0].blob.id)
                await engine._parts.holdings.drop(state, range(3))
                await engine.complete(str(ref))
                nursery.cancel_scope.cancel()
            print(json.dumps({"done": True}), flush=True)
    finally:
        cache.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("ref")
    parser.add_argument("step")
    parser.add_argument("count", type=int)
    parser.add_argument("--tally", type=Path)
    parser.add_argument("--readers", type=Path)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--swapped", action="store_true")
    given = parser.parse_args()
    trio.run(main, given.cache, given.ref, given.step, given.count, given)

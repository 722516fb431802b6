"""A real engine over a real cache directory, for tests: every use ends with `check()`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from weightfs.engine.engine import Engine, open_engine
from weightfs.engine.settings import EngineSettings
from weightfs.store.cache import Cache

QUIET_SECONDS = 30.0


@asynccontextmanager
async def running_engine(
    root: Path, settings: EngineSettings | None = None, *, calm: bool = True
) -> AsyncIterator[Engine]:
    """An engine on the cache at `root`. With `calm`, waits at the end until nothing is in flight, and checks memory.

    The index and the files are always checked, every recorded chunk hashed. AssertionError with the sentences found.
    """
    cache = await trio.to_thread.run_sync(lambda: Cache.open(root, now=int(time.time())))
    try:
        async with open_engine(cache, settings or EngineSettings(workers=0)) as engine:
            yield engine
            if calm:
                with trio.fail_after(QUIET_SECONDS):
                    await engine.quiet()
                problems = engine.check()
                assert not problems, problems
        problems = await trio.to_thread.run_sync(lambda: cache.check(deep=True))
        assert not problems, problems
    finally:
        await trio.to_thread.run_sync(cache.close)

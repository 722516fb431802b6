"""A process that pulls one ref with two fetch workers, and kills itself at a named step: for test_crash.py.

    python driver.py CACHE REF STEP COUNT

`STEP` is one of `STEPS`, or `never`; `COUNT` says at which passing of it. Prints one JSON line at the start (process id
and those of the workers), one when it is done, and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from weightfs.core.geometry import MIB
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine.committer import Committer
from weightfs.engine.engine import open_engine
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


async def main(root: Path, text: str, step: str, count: int) -> None:
    cache = Cache.open(root, now=int(time.time()))
    arm(step, count)
    try:
        async with open_engine(cache, SETTINGS) as engine:
            while len(engine.status().worker_pids) < 2:
                await trio.sleep(0.01)
            print(json.dumps({"pid": os.getpid(), "workers": engine.status().worker_pids}), flush=True)
            ref = parse_ref(text)
            manifest = await engine.add(ref)
            await engine.complete(str(ref))
            state = engine._catalog.state(manifest.entries[0].blob.id)
            await engine._holdings.drop(state, range(3))
            await engine.complete(str(ref))
            print(json.dumps({"done": True}), flush=True)
    finally:
        cache.close()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))

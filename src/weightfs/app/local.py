"""A cache and its engine in this process, or the daemon that has the cache already.

Order of the ends: the control socket closes, the engine commits what landed, the cache is marked clean and
unlocked.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Final

import trio

from weightfs.app.settings import with_header_origins
from weightfs.control.client import find_daemon
from weightfs.control.metrics import Scraper
from weightfs.control.operations import EngineOperations, ProcessInfo
from weightfs.control.ports import Operations
from weightfs.engine.engine import Engine, open_engine
from weightfs.engine.settings import EngineSettings
from weightfs.errors import CacheBusyError, DaemonError
from weightfs.store.cache import Cache

# A daemon that has just taken the lock answers a moment later; a short command has let it go by then.
BUSY_PATIENCE: Final = 10.0  # seconds
BUSY_POLL: Final = 0.1

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_cache(root: Path, *, create: bool) -> AsyncIterator[Cache]:
    """The cache, locked for us. CacheError and its kinds."""
    cache = await trio.to_thread.run_sync(partial(Cache.open, root, create=create, now=int(time.time())))
    try:
        yield cache
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(cache.close)


@contextlib.asynccontextmanager
async def open_local(
    info: ProcessInfo, settings: EngineSettings, *, create: bool, serve_control: bool
) -> AsyncIterator[tuple[Engine, EngineOperations]]:
    """An engine on the cache, and the operations on it; with `serve_control`, other commands can ask them too."""
    async with open_cache(info.cache, create=create) as cache:
        settings = with_header_origins(settings, await trio.to_thread.run_sync(cache.ref_names))
        async with _open_operations(info, settings, cache, serve_control=serve_control) as pair:
            yield pair


@contextlib.asynccontextmanager
async def _open_operations(
    info: ProcessInfo, settings: EngineSettings, cache: Cache, *, serve_control: bool
) -> AsyncIterator[tuple[Engine, EngineOperations]]:
    async with open_engine(cache, settings) as engine, trio.open_nursery() as nursery:
        operations = EngineOperations(engine, info, nursery)
        if serve_control:
            await _start_control(nursery, operations, Scraper(engine, info.mount_measures), info.cache)
        try:
            yield engine, operations
        finally:
            nursery.cancel_scope.cancel()


async def _start_control(
    nursery: trio.Nursery, operations: EngineOperations, scraper: Scraper, cache: Path
) -> None:
    from weightfs.control.server import serve

    try:
        await nursery.start(partial(serve, operations, cache, scraper=scraper))
    except DaemonError as error:
        # Readers do not need it: a file system without Unix sockets costs the status, not the models.
        log.warning("%s", error)


@contextlib.asynccontextmanager
async def take_over(
    info: ProcessInfo, settings: EngineSettings, *, patience: float = BUSY_PATIENCE
) -> AsyncIterator[tuple[Engine, EngineOperations]]:
    """An engine on the cache, and the operations on it, for a mount. A short command that has it is waited for.

    Raises:
        CacheBusyError: Another mount has it, or somebody has had it for too long.
        CacheError: It cannot be opened.
    """
    deadline = trio.current_time() + patience
    while True:
        async with contextlib.AsyncExitStack() as stack:
            try:
                local = open_local(info, settings, create=True, serve_control=True)
                pair = await stack.enter_async_context(local)
            except CacheBusyError as error:
                if trio.current_time() >= deadline:
                    raise
                await _refuse_second_mount(info.cache, error)
            else:
                yield pair
                return
        await trio.sleep(BUSY_POLL)


async def _refuse_second_mount(cache: Path, error: CacheBusyError) -> None:
    async with find_daemon(cache) as daemon:
        if daemon is not None and daemon.process["role"] == "mount":
            raise CacheBusyError(
                f"the cache {cache} is mounted at {daemon.process['mountpoint']} (pid {daemon.process['pid']}); "
                "`weightfs pull` adds a ref there, or name another cache with --cache",
                pid=error.pid,
            ) from None


@contextlib.asynccontextmanager
async def find_operations(
    root: Path,
    role: str,
    settings: EngineSettings,
    *,
    create: bool = False,
    serve_control: bool = False,
    patience: float = BUSY_PATIENCE,
) -> AsyncIterator[tuple[Operations, bool]]:
    """The operations on a cache, and whether a daemon does them.

    Raises:
        CacheBusyError: Somebody has the cache and does not answer its control socket.
        CacheError: It cannot be opened.
    """
    info = ProcessInfo(role, root, None, int(time.time()))
    deadline = trio.current_time() + patience
    while True:
        async with contextlib.AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(find_daemon(root))
            if daemon is not None:
                yield daemon, True
                return
            try:
                local = open_local(info, settings, create=create, serve_control=serve_control)
                _, operations = await stack.enter_async_context(local)
            except CacheBusyError:
                if trio.current_time() >= deadline:
                    raise
            else:
                yield operations, False
                return
        await trio.sleep(BUSY_POLL)

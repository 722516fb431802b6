"""The parts of an engine: made, connected, started, reloaded and stopped.

Rules: one trio run. A part gets what it uses when it is made; those that need one another are connected before anything
runs. What lands until the end is committed by `flush`, when nothing else runs any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import trio

from weightfs.core.planner import Planner
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.committer import Committer
from weightfs.engine.details import Details
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.hashing import Hasher
from weightfs.engine.headers import Headers
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.origins import Origins
from weightfs.engine.overview import Overview
from weightfs.engine.pacing import pacer_of
from weightfs.engine.pinning import Pinning
from weightfs.engine.reader import Reader
from weightfs.engine.readership import Readership
from weightfs.engine.repair import Repair
from weightfs.engine.room import Room
from weightfs.engine.seal import Sealer
from weightfs.engine.settings import LIVE, EngineSettings
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.engine.upkeep import Upkeep
from weightfs.engine.workers import WorkerPool
from weightfs.sources import open_source
from weightfs.sources.base import FetchSettings, Source
from weightfs.store.cache import Cache
from weightfs.store.memory import MemoryFile


class Parts:
    """One per engine. `changed()` is called when other refs are pinned than before."""

    def __init__(
        self, cache: Cache, settings: EngineSettings, nursery: trio.Nursery, changed: Callable[[], None]
    ) -> None:
        self.settings = settings
        self.cache = cache
        self._nursery = nursery
        self.origins = Origins(settings.fetch, _open)
        self.planner = Planner(settings.limits)
        self.tally = Tally()
        self.catalog = Catalog(cache, settings)
        self.holdings = Holdings(cache, self.planner, self.catalog.get, self._durable, nursery)
        self.memory = MemoryFile()
        self.pool = WorkerPool(
            settings, self._handle, keep_fds=(cache.lock_fd,), memory=self.memory.descriptor
        )
        pacer = pacer_of(settings)
        self.fetcher = Fetcher(
            self.planner,
            self.pool,
            self.holdings.landed,
            self.holdings.mend,
            nursery,
            pacer,
            self.tally,
        )
        self.committer = Committer(cache, settings, self.holdings.committed, self.holdings.lost)
        self.room = Room(cache, settings, self.catalog, self.planner, self.fetcher, self.holdings)
        self.uncached = Uncached(settings.limits, self.pool, self.memory, pacer, self.tally, nursery)
        self.keeper = Keeper(self.catalog, self.planner, self.fetcher, self.holdings, settings, nursery)
        self.watch = DiskWatch(cache, self.catalog, self.fetcher, self.keeper.revive)
        self.holdings.connect(self.fetcher, self.committer, self.room.relieve, self.watch.failed)
        self.fetcher.connect(self.room.poke, self.room.relieve, self.watch.failed)
        self.hasher = Hasher(cache, self.pool.submit)
        self.sealer = Sealer(self.hasher, self.committer, self.holdings, lambda: self.planner.waiting() > 0)
        self.reader = Reader(
            cache,
            self.planner,
            self.fetcher,
            self.holdings,
            self.uncached,
            lambda: self.watch.bypassed,
            settings=settings,
            nursery=nursery,
            tally=self.tally,
        )
        self.headers = Headers(self.catalog, self.reader, nursery)
        self.details = Details(self.headers)
        self.pinning = Pinning(
            cache=cache,
            catalog=self.catalog,
            planner=self.planner,
            fetcher=self.fetcher,
            holdings=self.holdings,
            uncached=self.uncached,
            committer=self.committer,
            room=self.room,
            sealer=self.sealer,
            keeper=self.keeper,
            headers=self.headers,
            origins=self.origins,
            pool=self.pool,
            settings=settings,
            changed=changed,
        )
        self.readership = Readership(
            catalog=self.catalog,
            fetcher=self.fetcher,
            holdings=self.holdings,
            room=self.room,
            keeper=self.keeper,
            watch=self.watch,
            pinning=self.pinning,
            settings=settings,
            nursery=nursery,
        )
        self.upkeep = Upkeep(
            self.catalog,
            self.planner,
            self.fetcher,
            self.holdings,
            self.hasher,
            self.sealer,
            self.keeper,
            self.watch,
        )
        self.repair = Repair(
            cache,
            self.catalog,
            self.fetcher,
            self.uncached,
            self.holdings,
            self.committer,
            self.upkeep,
        )
        self.overview = Overview(
            cache=cache,
            catalog=self.catalog,
            planner=self.planner,
            pool=self.pool,
            fetcher=self.fetcher,
            uncached=self.uncached,
            committer=self.committer,
            holdings=self.holdings,
            room=self.room,
            watch=self.watch,
            tally=self.tally,
        )

    async def start(self) -> None:
        """Begin all that goes on by itself."""
        await trio.to_thread.run_sync(self._load)  # before anybody reads; signals are heard meanwhile
        await self._nursery.start(self.pool.run)
        await self.pinning.introduce(self.catalog.states())
        self.room.open()
        for task in (
            self.fetcher.keep_time,
            self.fetcher.keep_pace,
            self.committer.run,
            self.sealer.run,
            self.room.run,
            self.uncached.fetcher.keep_time,
            self.uncached.fetcher.keep_pace,
            self.uncached.run,
            self.watch.run,
        ):
            self._nursery.start_soon(task)
        await self.pinning.begin(self.catalog.states())

    def _load(self) -> None:
        self.catalog.load()
        self.room.give_back_leftovers()

    async def close(self) -> None:
        """Fail the readers, and end everything that runs."""
        self.fail_reads()
        await self.origins.aclose()
        self._nursery.cancel_scope.cancel()

    async def reload(self, new: EngineSettings) -> tuple[str, ...]:
        """Take over what may change while it runs (`settings.LIVE`). The names of what differs and may not."""
        old = self.settings
        self.settings = live = replace(old, **{name: getattr(new, name) for name in LIVE})
        self.pinning.reload(live)
        if live.fetch != old.fetch:
            self.pool.change(live.fetch)
            await self.origins.change(live.fetch)
        pacer = pacer_of(live)
        self.fetcher.reload(pacer)
        self.uncached.fetcher.reload(pacer)
        self.reader.reload(live)
        self.room.reload(live)
        return tuple(f.name for f in fields(live) if getattr(new, f.name) != getattr(live, f.name))

    async def flush(self) -> None:
        """Commit what has landed, and what was used when."""
        with trio.CancelScope(shield=True):
            await self.committer.flush()
            await self.room.note_uses()

    def fail_reads(self) -> None:
        """Every waiting and every later read gets ReadError at once: before unmounting."""
        for fetcher in (self.fetcher, self.uncached.fetcher):
            fetcher.fail_waiters("weightfs is being unmounted")
        for state in self.catalog.states():
            state.notify()

    def _handle(self, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Hashed) or (isinstance(message, wire.JobFailed) and message.job < 0):
            self.hasher.handle(message)
        elif not self.uncached.handle(message):
            self.fetcher.handle(message)

    def _durable(self, state: BlobState) -> None:
        self.sealer.poke(state)

    async def quiet(self) -> None:
        """Wait until nothing is in flight and everything is durable and sealed as far as it can be. For tests."""
        # Waits for a commit that is being done, too: it is not `pending` any more.
        await self.committer.flush()
        while not (
            self.planner.idle()
            and self.uncached.planner.idle()
            and self.pool.jobs == 0
            and not self.committer.pending
            and self.sealer.idle
            and not self.headers.busy
        ):
            await trio.sleep(0.01)
            await self.committer.flush()


async def _open(scheme: str, settings: FetchSettings) -> Source:
    # In a thread: the first time it imports, for longer than the readers should wait for the loop.
    return await trio.to_thread.run_sync(open_source, scheme, settings)

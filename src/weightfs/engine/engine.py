"""The engine: what the mount, the control socket and the command line see of weightfs.

Rules: one trio run. Everything but the `async` methods answers from memory; of the `async` ones, only `add`, `update`,
`browse`, `complete`, `verify`, `repair`, and, of many files, `details` and `tensor_map` may wait for longer than
`read_timeout`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import trio

from weightfs.core.diskhealth import Health
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Manifest
from weightfs.core.planner import Planner
from weightfs.core.ref import Ref
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.causes import one_cause
from weightfs.engine.committer import Committer
from weightfs.engine.details import Details, RefDetails
from weightfs.engine.explain import FetchStatus, WaitStatus
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.hashing import Hasher
from weightfs.engine.headers import Headers
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.measures import Measures
from weightfs.engine.origins import Origins
from weightfs.engine.overview import Overview
from weightfs.engine.pacing import pacer_of
from weightfs.engine.pinning import Pinning
from weightfs.engine.reader import Reader
from weightfs.engine.readership import Readership
from weightfs.engine.repair import Repair
from weightfs.engine.room import Room
from weightfs.engine.seal import Sealer
from weightfs.engine.settings import LIVE, EngineSettings, FillMode
from weightfs.engine.status import (
    BlobStatus,
    CacheSpace,
    EngineStatus,
    GcReport,
    RefUpdate,
    RepairReport,
    VerifyProgress,
    VerifyReport,
)
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.engine.upkeep import Upkeep
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind, ReadError
from weightfs.sources import open_source
from weightfs.sources.base import FetchSettings, Source
from weightfs.store.cache import Cache, StoredRef
from weightfs.store.memory import MemoryFile

log = logging.getLogger(__name__)

HEADERS_SECONDS = 60.0  # how long `headers_ready` waits


class Engine:
    """Made by `open_engine`."""

    def __init__(self, cache: Cache, settings: EngineSettings, nursery: trio.Nursery) -> None:
        self.settings = settings
        self.on_change: Callable[[], None] = lambda: None
        self._cache = cache
        self._nursery = nursery
        self._origins = Origins(settings.fetch, _open)
        self._planner = Planner(settings.limits)
        self._tally = Tally()
        self._catalog = Catalog(cache, settings)
        self._holdings = Holdings(cache, self._planner, self._catalog.get, self._durable, nursery)
        self._memory = MemoryFile()
        self._pool = WorkerPool(
            settings, self._handle, keep_fds=(cache.lock_fd,), memory=self._memory.descriptor
        )
        pacer = pacer_of(settings)
        self._fetcher = Fetcher(
            self._planner,
            self._pool,
            self._holdings.landed,
            self._holdings.mend,
            nursery,
            pacer,
            self._tally,
        )
        self._committer = Committer(cache, settings, self._holdings.committed, self._holdings.lost)
        self._room = Room(cache, settings, self._catalog, self._planner, self._fetcher, self._holdings)
        self._uncached = Uncached(settings.limits, self._pool, self._memory, pacer, self._tally, nursery)
        self._keeper = Keeper(self._catalog, self._planner, self._fetcher, self._holdings, settings, nursery)
        self._watch = DiskWatch(cache, self._catalog, self._fetcher, self._keeper.revive)
        self._holdings.connect(self._fetcher, self._committer, self._room.relieve, self._watch.failed)
        self._fetcher.connect(self._room.poke, self._room.relieve, self._watch.failed)
        self._hasher = Hasher(cache, self._pool.submit)
        self._sealer = Sealer(
            self._hasher, self._committer, self._holdings, lambda: self._planner.waiting() > 0
        )
        self._reader = Reader(
            cache,
            self._planner,
            self._fetcher,
            self._holdings,
            self._uncached,
            lambda: self._watch.bypassed,
            settings=settings,
            nursery=nursery,
            tally=self._tally,
        )
        self._headers = Headers(self._catalog, self._reader, nursery)
        self._details = Details(self._headers)
        self._pinning = Pinning(
            cache=cache,
            catalog=self._catalog,
            planner=self._planner,
            fetcher=self._fetcher,
            holdings=self._holdings,
            uncached=self._uncached,
            committer=self._committer,
            room=self._room,
            sealer=self._sealer,
            keeper=self._keeper,
            headers=self._headers,
            origins=self._origins,
            pool=self._pool,
            settings=settings,
            changed=self._changed,
        )
        self._readership = Readership(
            catalog=self._catalog,
            fetcher=self._fetcher,
            holdings=self._holdings,
            room=self._room,
            keeper=self._keeper,
            watch=self._watch,
            pinning=self._pinning,
            settings=settings,
            nursery=nursery,
        )
        self._upkeep = Upkeep(
            self._catalog,
            self._planner,
            self._fetcher,
            self._holdings,
            self._hasher,
            self._sealer,
            self._keeper,
            self._watch,
        )
        self._repair = Repair(
            cache,
            self._catalog,
            self._fetcher,
            self._uncached,
            self._holdings,
            self._committer,
            self._upkeep,
        )
        self._overview = Overview(
            cache=cache,
            catalog=self._catalog,
            planner=self._planner,
            pool=self._pool,
            fetcher=self._fetcher,
            uncached=self._uncached,
            committer=self._committer,
            holdings=self._holdings,
            room=self._room,
            watch=self._watch,
            tally=self._tally,
        )

    # ---- life

    async def _start(self) -> None:
        await trio.to_thread.run_sync(self._load)  # before anybody reads; signals are heard meanwhile
        await self._nursery.start(self._pool.run)
        await self._pinning.introduce(self._catalog.states())
        self._room.open()
        for task in (
            self._fetcher.keep_time,
            self._fetcher.keep_pace,
            self._committer.run,
            self._sealer.run,
            self._room.run,
            self._uncached.fetcher.keep_time,
            self._uncached.fetcher.keep_pace,
            self._uncached.run,
            self._watch.run,
        ):
            self._nursery.start_soon(task)
        await self._pinning.begin(self._catalog.states())

    def _load(self) -> None:
        self._catalog.load()
        self._room.give_back_leftovers()

    async def _close(self) -> None:
        self.fail_reads()
        await self._origins.aclose()
        self._nursery.cancel_scope.cancel()

    async def reload(self, new: EngineSettings) -> tuple[str, ...]:
        """Take over what may change while it runs (`settings.LIVE`). The names of what differs and may not."""
        old = self.settings
        self.settings = live = replace(old, **{name: getattr(new, name) for name in LIVE})
        self._pinning.reload(live)
        if live.fetch != old.fetch:
            self._pool.change(live.fetch)
            await self._origins.change(live.fetch)
        pacer = pacer_of(live)
        self._fetcher.reload(pacer)
        self._uncached.fetcher.reload(pacer)
        self._reader.reload(live)
        self._room.reload(live)
        return tuple(f.name for f in fields(live) if getattr(new, f.name) != getattr(live, f.name))

    async def _flush(self) -> None:
        with trio.CancelScope(shield=True):
            await self._committer.flush()
            await self._room.note_uses()

    def fail_reads(self) -> None:
        """Every waiting and every later read gets ReadError at once: before unmounting."""
        for fetcher in (self._fetcher, self._uncached.fetcher):
            fetcher.fail_waiters("weightfs is being unmounted")
        for state in self._catalog.states():
            state.notify()

    def _handle(self, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Hashed) or (isinstance(message, wire.JobFailed) and message.job < 0):
            self._hasher.handle(message)
        elif not self._uncached.handle(message):
            self._fetcher.handle(message)

    def _changed(self) -> None:
        self.on_change()

    def _durable(self, state: BlobState) -> None:
        self._sealer.poke(state)

    # ---- refs

    def manifests(self) -> tuple[Manifest, ...]:
        """What is pinned."""
        return self._catalog.manifests()

    def refs(self) -> list[StoredRef]:
        """What is pinned, and since when."""
        return self._catalog.refs()

    async def add(self, ref: Ref, *, refresh: bool = False, headers: bool = True) -> Manifest:
        """Pin a ref and show it. A pinned one is served from the index without asking anybody, unless `refresh`.

        With `headers`, small files and headers that are not cached are then fetched in the background, if the settings
        have `headers_first`.
        SourceError, ChunkListError, SignatureError, CacheError.
        """
        return await self._pinning.add(ref, refresh=refresh, headers=headers)

    async def update(self, ref_text: str) -> RefUpdate:
        """Ask what a known ref is now, and follow it there. KeyError if it is unknown; else as `add`."""
        return await self._pinning.update(ref_text)

    async def browse(self, ref: Ref) -> None:
        """Let a ref be known because somebody looked at its path: as `add`, and nothing of it is fetched.

        SourceError (AUTH) also if the configured headers would go to a host that nothing but the path has named.
        """
        await self._pinning.browse(ref)

    async def pin(self, ref_text: str, *, pinned: bool) -> None:
        """Keep all of a ref, from now on and after every start; or no longer. KeyError if it is unknown."""
        await self._pinning.pin(ref_text, pinned=pinned)

    async def set_fill(self, ref_text: str, mode: FillMode | None) -> None:
        """How much of a ref is completed in the background, from now on and after every start; None: as configured.

        KeyError if it is unknown.
        """
        await self._pinning.set_fill(ref_text, mode)

    async def pause(self, ref_text: str, *, paused: bool) -> None:
        """Fetch nothing of a ref in the background, from now on and after every start; or again. KeyError."""
        await self._pinning.pause(ref_text, paused=paused)

    async def pause_all(self, *, paused: bool) -> None:
        """Fetch nothing at all in the background; or again what is not paused by itself."""
        await self._pinning.pause_all(paused=paused)

    @property
    def all_paused(self) -> bool:
        """Whether nothing at all is fetched in the background."""
        return self._catalog.all_paused

    async def remove(self, ref_text: str) -> int:
        """Forget a ref and delete what only it had; the bytes freed. KeyError if it is not pinned."""
        return await self._pinning.remove(ref_text)

    async def headers_ready(self, ref_text: str, *, within: float = HEADERS_SECONDS) -> bool:
        """Wait until what `add` fetches in the background is there, or was given up. False: it took too long."""
        stored = self._catalog.ref(ref_text)
        with trio.move_on_after(within) as scope:
            await self._headers.ready(ref_text if stored is None else stored.manifest.ref)
        return not scope.cancelled_caught

    async def details(self, ref_text: str, *, fetch: bool = False) -> RefDetails:
        """What its cached headers say about a ref; with `fetch`, those that are missing are fetched. KeyError."""
        return await self._details.details(self._catalog.known(ref_text).manifest, fetch=fetch)

    async def tensor_map(self, ref_text: str, *, layers: bool = False, fetch: bool = False) -> dict[str, Any]:
        """Where the tensors of a ref lie and how much of each is cached, as plain values. KeyError."""
        return await self._details.tensor_map(
            self._catalog.known(ref_text).manifest, layers=layers, fetch=fetch
        )

    async def chunk_map(self, ref_text: str) -> dict[str, Any]:
        """Which chunks of a ref are there or on their way, as plain values. KeyError."""
        return await self._details.chunk_map(self._catalog.known(ref_text).manifest, self._overview.flying())

    async def complete(self, ref_text: str) -> None:
        """Fetch all of a ref and wait until it is sealed. KeyError, ReadError, IntegrityError."""
        await self._upkeep.complete(ref_text)

    async def verify(
        self, ref_text: str, *, repair: bool, on_progress: Callable[[VerifyProgress], None] = lambda _: None
    ) -> VerifyReport:
        """Compare what is cached with the records. KeyError, CacheError; ReadError if a repair fails."""
        return await self._upkeep.verify(ref_text, repair=repair, on_progress=on_progress)

    async def repair(
        self, ref_text: str, *, on_progress: Callable[[VerifyProgress], None] = lambda _: None
    ) -> RepairReport:
        """Fetch again what is bad on the disk or quarantined. KeyError, CacheError, ReadError."""
        return await self._repair.repair(ref_text, on_progress)

    async def gc(self, *, dry_run: bool = False) -> GcReport:
        """Evict what is too old or beyond the limits; or only say what that is."""
        return await self._room.gc(dry_run=dry_run)

    # ---- what the mount asks

    @property
    def read_timeout(self) -> float:
        """The bound of reads that begin now, in seconds; 0: there is none."""
        return self.settings.read_timeout

    def blob_status(self, id: BlobId) -> BlobStatus:  # noqa: A002 - the contract's name
        """The state of a blob. KeyError if there is none."""
        return self._catalog.state(id).status()

    def backing(self, id: BlobId) -> Path | None:  # noqa: A002 - the contract's name
        """The cache file of a blob of which nothing is left to be checked: the kernel may read it. Else None.

        Not from a disk that has failed lately: what the kernel cannot read there it cannot have from the network.
        """
        state = self._catalog.get(id)
        passed = state is not None and state.may_be_passed and self._watch.state is Health.HEALTHY
        return state.path if state is not None and passed else None

    def statfs(self) -> CacheSpace:
        """Room of the cache's filesystem, a few seconds ago."""
        return self._room.space

    def read_nowait(self, id: BlobId, span: ByteSpan) -> bytes | None:  # noqa: A002 - the contract's name
        """The same as `read`, if nothing has to be waited for; else None, and nothing was done."""
        state = self._catalog.get(id)
        return None if state is None else self._reader.read_nowait(state, span)

    async def read(self, id: BlobId, span: ByteSpan) -> bytes:  # noqa: A002 - the contract's name
        """Exactly the bytes of `span`, clipped at the end of the blob. ReadError within `read_timeout`."""
        state = self._catalog.get(id)
        if state is None:
            raise ReadError("the model was removed", kind=FailureKind.CANCELLED)
        try:
            return await self._reader.read(state, span)
        except ReadError as error:
            self._tally.read_failures[error.kind] += 1
            raise

    def refuted(self, id: BlobId) -> int:  # noqa: A002 - the contract's name
        """How often the blob was found to be wrong as a whole, since the start; 0 if there is none."""
        state = self._catalog.get(id)
        return 0 if state is None else state.refuted

    def opened(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """A handle was opened: fetch head and tail, and fill if the mode says so. Never waits, never fails."""
        self._readership.opened(id)

    def released(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """A handle was released."""
        self._readership.released(id)

    # ---- looking at it

    def status(self) -> EngineStatus:
        """A snapshot of everything."""
        return self._overview.status()

    async def survey(self, files_at_most: int | None = None) -> EngineStatus:
        """The same, not of one moment: readers have their turns meanwhile. Of each ref at most so many files."""
        return await self._overview.survey(files_at_most)

    def progress(self, ref_text: str) -> tuple[int, int]:
        """Bytes of a ref's blobs, and how many of them are cached. KeyError if it is unknown."""
        states = self._catalog.blobs(ref_text)
        return sum(state.shape.size for state in states), sum(state.present_bytes for state in states)

    async def measures(self) -> Measures:
        """What is counted and measured, for machines. Readers have their turns meanwhile."""
        return await self._overview.measures()

    def explain(self, id: BlobId, span: ByteSpan) -> WaitStatus | None:  # noqa: A002 - the contract's name
        """Why a read of `span` has not been answered; its `str` is one line. None if the blob was removed."""
        return self._overview.explain(id, span)

    def fetches(self) -> tuple[FetchStatus, ...]:
        """What is in flight, oldest first."""
        return self._overview.fetches()

    async def probe(self) -> None:
        """Return when the index has answered a question, in one of the threads that reads use too. CacheError."""
        nobody = BlobId(bytes(16))
        await trio.to_thread.run_sync(self._cache.blob, nobody, abandon_on_cancel=True)

    def check(self) -> list[str]:
        """Sentences about anything in memory that should not be; empty if all is well and nothing is in flight."""
        return self._overview.check()

    async def quiet(self) -> None:
        """Wait until nothing is in flight and everything is durable and sealed as far as it can be. For tests."""
        await (
            self._committer.flush()
        )  # also waits for a commit that is being done: it is not `pending` any more
        while not (
            self._planner.idle()
            and self._uncached.planner.idle()
            and self._pool.jobs == 0
            and not self._committer.pending
            and self._sealer.idle
            and not self._headers.busy
        ):
            await trio.sleep(0.01)
            await self._committer.flush()


async def _open(scheme: str, settings: FetchSettings) -> Source:
    # In a thread: the first time it imports, for longer than the readers should wait for the loop.
    return await trio.to_thread.run_sync(open_source, scheme, settings)


@asynccontextmanager
async def open_engine(cache: Cache, settings: EngineSettings) -> AsyncIterator[Engine]:
    """An engine over an open cache, for as long as the block runs. What landed is committed before it returns."""
    engine: Engine | None = None
    try:
        async with one_cause(), trio.open_nursery() as nursery:
            engine = Engine(cache, settings, nursery)
            try:
                await engine._start()
                yield engine
            finally:
                await engine._close()
    finally:
        if engine is not None:
            await engine._flush()
            engine._memory.close()

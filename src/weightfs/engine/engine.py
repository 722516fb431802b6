"""The engine: what the mount, the control socket and the command line see of weightfs.

Rules: one trio run. Everything but the `async` methods answers from memory; of the `async` ones, only `add`, `update`,
`browse`, `complete`, `verify`, `repair`, and, of many files, `details` and `tensor_map` may wait for longer than
`read_timeout`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import trio

from weightfs import __version__
from weightfs.core import plan
from weightfs.core.diskhealth import Health
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId, Manifest, Policy
from weightfs.core.planner import Planner
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.causes import one_cause
from weightfs.engine.committer import Committer
from weightfs.engine.details import Details, RefDetails
from weightfs.engine.explain import FetchStatus, WaitStatus, describe_fetches, explain_wait
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.hashing import Hasher
from weightfs.engine.headers import Headers
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.measures import Measures, measure
from weightfs.engine.origins import Origins
from weightfs.engine.pacing import pacer_of
from weightfs.engine.reader import Reader
from weightfs.engine.repair import Repair
from weightfs.engine.report import describe_jobs, describe_refs
from weightfs.engine.room import Room
from weightfs.engine.seal import Sealer
from weightfs.engine.settings import LIVE, EngineSettings, FillMode
from weightfs.engine.status import (
    BlobStatus,
    CacheSpace,
    EngineStatus,
    GcReport,
    Outcome,
    RefUpdate,
    RepairReport,
    VerifyProgress,
    VerifyReport,
)
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.engine.upkeep import Upkeep
from weightfs.engine.workers import WorkerPool
from weightfs.errors import CacheError, FailureKind, IntegrityError, ReadError, SourceError
from weightfs.sources import home_of, keeps_headers, open_source
from weightfs.sources.base import FetchSettings, Source
from weightfs.store.cache import Cache, StoredRef
from weightfs.store.memory import MemoryFile

log = logging.getLogger(__name__)

AT_A_TIME = 256  # blobs of 100,000 that are paused before readers have a turn: a few milliseconds
HEADERS_SECONDS = 60.0  # how long `headers_ready` waits


class Engine:
    """Made by `open_engine`."""

    def __init__(self, cache: Cache, settings: EngineSettings, nursery: trio.Nursery) -> None:
        self.settings = settings
        self.on_change: Callable[[], None] = lambda: None
        self._cache = cache
        self._nursery = nursery
        self._started = trio.current_time()
        self._origins = Origins(settings.fetch, _open)
        # What is pinned changes one ref at a time: a blob that is being removed cannot be added meanwhile. Never held
        # while an origin is asked.
        self._pinning = trio.Lock()
        self._left: set[BlobId] = set()  # blobs without a ref that somebody still reads
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
        self._watch = DiskWatch(cache, self._catalog, self._fetcher, self._revive)
        self._holdings.connect(self._fetcher, self._committer, self._room.relieve, self._watch.failed)
        self._fetcher.connect(self._room.poke, self._room.relieve, self._watch.failed)
        self._hasher = Hasher(cache, self._pool.submit)
        self._sealer = Sealer(
            self._hasher, self._committer, self._holdings, lambda: self._planner.waiting() > 0
        )
        self._keeper = Keeper(self._catalog, self._planner, self._fetcher, self._holdings, settings, nursery)
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
            cache, self._catalog, self._fetcher, self._holdings, self._committer, self._upkeep
        )

    # ---- life

    async def _start(self) -> None:
        self._catalog.load()  # before anybody reads: the loop has nothing else to do
        self._room.give_back_leftovers()
        await self._nursery.start(self._pool.run)
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
        for state in self._catalog.states():
            self._begin(state)
        self._room.open()

    def _begin(self, state: BlobState) -> None:
        leftover = state.whole and state.stale  # what was written and not recorded keeps its room
        kept = [chunk for chunk in state.shape.chunks if chunk not in state.present] if leftover else ()
        self._fetcher.add(state, state.present, kept)
        self._keeper.begin(state)
        if len(state.durable) > state.frontier or state.durable.full:
            self._sealer.poke(state)

    async def _close(self) -> None:
        self.fail_reads()
        await self._origins.aclose()
        self._nursery.cancel_scope.cancel()

    async def reload(self, new: EngineSettings) -> tuple[str, ...]:
        """Take over what may change while it runs (`settings.LIVE`). The names of what differs and may not."""
        old = self.settings
        self.settings = live = replace(old, **{name: getattr(new, name) for name in LIVE})
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
        known = self._catalog.ref(str(ref))
        if known is None or refresh:
            manifest = await self._resolve(ref, known)
        else:
            manifest = known.manifest
        if headers and self.settings.headers_first:
            self._headers.start(manifest)
        return manifest

    async def _resolve(self, ref: Ref, known: StoredRef | None) -> Manifest:
        """Ask what it is, and pin that."""
        if known is not None and known.manifest.ref != str(ref):
            ref = parse_ref(known.manifest.ref)  # as it was spelt when it was added
        async with self._origins.using(ref.scheme) as source:
            manifest = await source.resolve(ref)
        if home := home_of(ref, self.settings.fetch):
            self._pool.own(home)
        if self.settings.policy is Policy.HOLD and any(not entry.blob.digest for entry in manifest.entries):
            raise IntegrityError(
                f"{manifest.ref} has no digest to be verified with, and policy hold would wait for ever; "
                "add #sha256=<hex> to the ref, publish a .meta4, or use --policy provisional"
            )
        async with self._pinning:
            if known is not None and self._catalog.ref(str(ref)) is None:
                raise ReadError(f"{ref} was removed meanwhile", kind=FailureKind.CANCELLED, ref=str(ref))
            with trio.CancelScope(shield=True):  # half of it would be a ref that is known and never shown
                for state in await self._catalog.put(manifest):
                    if self._planner.knows(state.id):
                        self._fetcher.feed(plan.Remirrored(state.id, state.mirrors))
                        try:
                            await self._holdings.adopt(state)
                        finally:  # the list counts from here on, recorded or not
                            self._uncached.changed(state)
                        self._keeper.begin(state)
                    else:
                        self._begin(state)
        self.on_change()
        if known is not None and _move(known, manifest.revision) is Outcome.ROLLED_BACK:
            log.warning(
                "%s went back to an older digest: from %s to %s",
                ref, known.manifest.revision, manifest.revision,
            )  # fmt: skip
        await self._tidy()
        return manifest

    async def update(self, ref_text: str) -> RefUpdate:
        """Ask what a known ref is now, and follow it there. KeyError if it is unknown; else as `add`."""
        before = self._known(ref_text)
        await self.add(parse_ref(before.manifest.ref), refresh=True)
        new = self._known(ref_text).manifest.revision
        return RefUpdate(before.manifest.ref, before.manifest.revision, new, _move(before, new))

    async def browse(self, ref: Ref) -> None:
        """Let a ref be known because somebody looked at its path: as `add`, and nothing of it is fetched.

        SourceError (AUTH) also if the configured headers would go to a host that nothing but the path has named.
        """
        if not keeps_headers(ref, self.settings.fetch, (stored.manifest.ref for stored in self.refs())):
            raise SourceError(
                f"{ref} is not looked up: the configured headers would go to a host that nothing but a path has named; "
                "use `weightfs add`, or name the host in an [[endpoint]]",
                kind=FailureKind.AUTH,
            )
        await self.add(ref, headers=False)

    async def pin(self, ref_text: str, *, pinned: bool) -> None:
        """Keep all of a ref, from now on and after every start; or no longer. KeyError if it is unknown."""
        async with self._pinning:
            await self._catalog.mark(ref_text, pinned=pinned)
            self._weigh(ref_text)
        self._room.poke()

    async def set_fill(self, ref_text: str, mode: FillMode | None) -> None:
        """How much of a ref is completed in the background, from now on and after every start; None: as configured.

        KeyError if it is unknown.
        """
        async with self._pinning:
            await self._catalog.mark(ref_text, fill="" if mode is None else mode.value)
            self._weigh(ref_text)

    async def pause(self, ref_text: str, *, paused: bool) -> None:
        """Fetch nothing of a ref in the background, from now on and after every start; or again. KeyError."""
        async with self._pinning:
            await self._catalog.mark(ref_text, paused=paused)
            self._weigh(ref_text)

    async def pause_all(self, *, paused: bool) -> None:
        """Fetch nothing at all in the background; or again what is not paused by itself."""
        async with self._pinning:
            await self._catalog.pause_all(paused=paused)
            for number, state in enumerate(self._catalog.states()):
                self._keeper.weigh(state)
                if number % AT_A_TIME == AT_A_TIME - 1:
                    await trio.lowlevel.checkpoint()  # readers come between

    @property
    def all_paused(self) -> bool:
        """Whether nothing at all is fetched in the background."""
        return self._catalog.all_paused

    def _weigh(self, ref_text: str) -> None:
        for _, state in self._catalog.files(ref_text):
            self._keeper.begin(state)
            self._keeper.rest(state)

    async def headers_ready(self, ref_text: str, *, within: float = HEADERS_SECONDS) -> bool:
        """Wait until what `add` fetches in the background is there, or was given up. False: it took too long."""
        stored = self._catalog.ref(ref_text)
        with trio.move_on_after(within) as scope:
            await self._headers.ready(ref_text if stored is None else stored.manifest.ref)
        return not scope.cancelled_caught

    async def details(self, ref_text: str, *, fetch: bool = False) -> RefDetails:
        """What its cached headers say about a ref; with `fetch`, those that are missing are fetched. KeyError."""
        return await self._details.details(self._known(ref_text).manifest, fetch=fetch)

    async def tensor_map(self, ref_text: str, *, layers: bool = False, fetch: bool = False) -> dict[str, Any]:
        """Where the tensors of a ref lie and how much of each is cached, as plain values. KeyError."""
        return await self._details.tensor_map(self._known(ref_text).manifest, layers=layers, fetch=fetch)

    async def chunk_map(self, ref_text: str) -> dict[str, Any]:
        """Which chunks of a ref are there or on their way, as plain values. KeyError."""
        flying: dict[BlobId, list[ChunkSpan]] = {}
        for job in self._planner.jobs(trio.current_time()):
            flying.setdefault(job.blob, []).append(job.chunks)
        return await self._details.chunk_map(self._known(ref_text).manifest, flying)

    def _known(self, ref_text: str) -> StoredRef:
        stored = self._catalog.ref(ref_text)
        if stored is None:
            raise KeyError(ref_text)
        return stored

    async def remove(self, ref_text: str) -> int:
        """Forget a ref and delete what only it had; the bytes freed. KeyError if it is not pinned."""
        freed = 0
        async with self._pinning:
            with trio.CancelScope(shield=True):  # half a removal would leave files that nothing names
                states = [state for _, state in self._catalog.files(ref_text)]
                orphans = await self._catalog.remove(ref_text)
                self.on_change()
                for state in orphans:
                    freed += await self._delete(state)
                for state in states:
                    self._keeper.weigh(state)
                    self._keeper.rest(state)
        return freed

    async def _tidy(self) -> None:
        """Delete what no ref names any more, as soon as nobody has it open."""
        async with self._pinning:
            with trio.CancelScope(shield=True):  # as in `remove`
                left = self._catalog.unnamed()
                self._left = {state.id for state in left if state.handles}
                for state in left:
                    if state.handles:
                        continue  # `released` comes back to it; so does the next start
                    self._catalog.forget(state)
                    try:
                        await self._delete(state)
                    except CacheError as error:
                        log.warning("what %s was before keeps its space: %s", state.ref, error)

    async def _delete(self, state: BlobState) -> int:
        self._sealer.forget(state)
        state.generation += 1
        with self._room.leaving(state):
            self._fetcher.remove(state.id)
            state.notify()
            await self._uncached.remove(state)
            await self._fetcher.drained(state)  # a job's last chunk may still be on its way to the file
            async with state.preparing:
                await self._committer.forget(state.id)
                return await trio.to_thread.run_sync(self._cache.delete_blob, state.id)

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
        state = self._catalog.get(id)
        if state is not None:
            state.handles += 1
            self._used(state)
            if not state.complete:
                self._nursery.start_soon(self._open, state)

    def released(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """A handle was released."""
        state = self._catalog.get(id)
        if state is not None:
            state.handles = max(0, state.handles - 1)
            self._used(state)
            if not state.handles:
                self._room.poke()  # it may be evicted from now on
            if not state.handles and id in self._left:
                self._nursery.start_soon(self._tidy)

    @staticmethod
    def _used(state: BlobState) -> None:
        if state.may_be_passed:  # the kernel does not say what it reads of it
            state.touch(state.shape.chunks)

    async def _open(self, state: BlobState) -> None:
        state.filling = state.filling or self.settings.fill is FillMode.OPENED
        if self._watch.bypassed:
            return  # `_revive` comes back to it
        try:
            if not await self._holdings.prepare(state):
                return
        except CacheError as error:
            log.error("%s", error)
            return
        # Runtimes read the last bytes first, then the head: both are on their way at once.
        for chunk in {0, state.shape.chunk_count - 1}:
            if chunk not in state.present:
                self._fetcher.feed(plan.Want(state.id, ChunkSpan(chunk, chunk + 1)))
        if self._keeper.mode(state) is FillMode.OPENED:
            try:
                await self._holdings.fill(state)
            except CacheError as error:
                log.error("%s", error)

    def _revive(self) -> None:
        for state in self._catalog.states():
            if state.filling and not state.complete:
                self._nursery.start_soon(self._fill_again, state)

    async def _fill_again(self, state: BlobState) -> None:
        try:
            await self._holdings.fill(state)
        except CacheError as error:
            log.error("%s", error)

    # ---- looking at it

    def status(self) -> EngineStatus:
        """A snapshot of everything."""
        now = trio.current_time()
        full = str(self._committer.trouble or self._room.trouble)
        trouble = self._watch.trouble or self._uncached.trouble(full)
        uncached = self._uncached.fetcher.fetched_bytes
        return EngineStatus(
            version=__version__,
            pid=os.getpid(),
            worker_pids=self._pool.pids,
            uptime=now - self._started,
            cache=str(self._cache.root),
            cache_bytes=sum(state.present_bytes for state in self._catalog.states()),
            held_bytes=self._planner.held_bytes,
            limit_bytes=self._room.limit,
            evicted_bytes=self._room.evicted_bytes,
            free_bytes=self._room.space.free_bytes,
            fetched_bytes=self._fetcher.fetched_bytes + uncached,
            mismatched_chunks=self._fetcher.mismatches + self._uncached.fetcher.mismatches,
            disk_faults=self._holdings.disk_faults,
            disk=self._watch.state.value,
            uncached_bytes=uncached,
            trouble=trouble,
            paused=self._catalog.all_paused,
            refs=describe_refs(self._catalog, self._planner, now),
            jobs=(*describe_jobs(self._planner, now), *describe_jobs(self._uncached.planner, now)),
        )

    async def measures(self) -> Measures:
        """What is counted and measured, for machines. Readers have their turns meanwhile."""
        return await measure(
            self._catalog, self._planner, self._pool, self._fetcher, self._committer, self._holdings, self._room,
            self._tally,
        )  # fmt: skip

    def explain(self, id: BlobId, span: ByteSpan) -> WaitStatus | None:  # noqa: A002 - the contract's name
        """Why a read of `span` has not been answered; its `str` is one line. None if the blob was removed."""
        now = trio.current_time()
        return explain_wait(self._catalog.get(id), self._planner, span, self._pool.pids, now)

    def fetches(self) -> tuple[FetchStatus, ...]:
        """What is in flight, oldest first."""
        return describe_fetches(self._catalog, self._planner, trio.current_time())

    async def probe(self) -> None:
        """Return when the index has answered a question, in one of the threads that reads use too. CacheError."""
        nobody = BlobId(bytes(16))
        await trio.to_thread.run_sync(self._cache.blob, nobody, abandon_on_cancel=True)

    def check(self) -> list[str]:
        """Sentences about anything in memory that should not be; empty if all is well and nothing is in flight."""
        problems = self._planner.check() + self._uncached.check()
        if not self._planner.idle():
            problems.append(f"{self._fetcher.jobs} fetches in flight, {self._planner.waiting()} readers wait")
        if self._fetcher.paced > self._fetcher.jobs:
            problems.append(f"{self._fetcher.paced - self._fetcher.jobs} fetches are paced that have ended")
        if self._pool.jobs:
            problems.append(f"{self._pool.jobs} jobs of the workers are unanswered")
        for state in self._catalog.states():
            actual = state.present.byte_count(state.shape)
            if state.present_bytes != actual:
                problems.append(f"{state.ref}: {state.present_bytes} bytes said to be present, {actual} are")
            if any(chunk not in state.present for chunk in state.durable):
                problems.append(f"{state.ref}: something durable is not visible")
        return problems

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


def _move(before: StoredRef, revision: str) -> Outcome:
    if revision == before.manifest.revision:
        return Outcome.UNCHANGED
    return Outcome.ROLLED_BACK if revision in before.previous else Outcome.UPDATED


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

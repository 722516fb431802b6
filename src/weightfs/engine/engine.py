"""The engine: what the mount, the control socket and the command line see of weightfs.

Rules: one trio run. Everything but the `async` methods answers from memory; of the `async` ones, only `add`, `update`,
`browse`, `complete`, `verify`, `repair`, and, of many files, `details` and `tensor_map` may wait for longer than
`read_timeout`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from weightfs.core.diskhealth import Health
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Manifest
from weightfs.core.ref import Ref
from weightfs.engine.causes import one_cause
from weightfs.engine.details import RefDetails
from weightfs.engine.explain import FetchStatus, WaitStatus
from weightfs.engine.measures import Measures
from weightfs.engine.parts import Parts
from weightfs.engine.settings import EngineSettings, FillMode
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
from weightfs.errors import FailureKind, ReadError
from weightfs.store.cache import Cache, StoredRef

log = logging.getLogger(__name__)

HEADERS_SECONDS = 60.0  # how long `headers_ready` waits


class Engine:
    """Made by `open_engine`. `on_change()` is called when other refs are pinned than before."""

    def __init__(self, cache: Cache, settings: EngineSettings, nursery: trio.Nursery) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._parts = Parts(cache, settings, nursery, self._changed)

    def _changed(self) -> None:
        self.on_change()

    @property
    def settings(self) -> EngineSettings:
        """As it runs now."""
        return self._parts.settings

    async def reload(self, new: EngineSettings) -> tuple[str, ...]:
        """Take over what may change while it runs (`settings.LIVE`). The names of what differs and may not."""
        return await self._parts.reload(new)

    def fail_reads(self) -> None:
        """Every waiting and every later read gets ReadError at once: before unmounting."""
        self._parts.fail_reads()

    # ---- refs

    def manifests(self) -> tuple[Manifest, ...]:
        """What is pinned."""
        return self._parts.catalog.manifests()

    def refs(self) -> list[StoredRef]:
        """What is pinned, and since when."""
        return self._parts.catalog.refs()

    async def add(self, ref: Ref, *, refresh: bool = False, headers: bool = True) -> Manifest:
        """Pin a ref and show it. A pinned one is served from the index without asking anybody, unless `refresh`.

        With `headers`, small files and headers that are not cached are then fetched in the background, if the settings
        have `headers_first`.
        SourceError, ChunkListError, SignatureError, CacheError.
        """
        return await self._parts.pinning.add(ref, refresh=refresh, headers=headers)

    async def update(self, ref_text: str) -> RefUpdate:
        """Ask what a known ref is now, and follow it there. KeyError if it is unknown; else as `add`."""
        return await self._parts.pinning.update(ref_text)

    async def browse(self, ref: Ref) -> None:
        """Let a ref be known because somebody looked at its path: as `add`, and nothing of it is fetched.

        SourceError (AUTH) also if the configured headers would go to a host that nothing but the path has named.
        """
        await self._parts.pinning.browse(ref)

    async def pin(self, ref_text: str, *, pinned: bool) -> None:
        """Keep all of a ref, from now on and after every start; or no longer. KeyError if it is unknown."""
        await self._parts.pinning.pin(ref_text, pinned=pinned)

    async def set_fill(self, ref_text: str, mode: FillMode | None) -> None:
        """How much of a ref is completed in the background, from now on and after every start; None: as configured.

        KeyError if it is unknown.
        """
        await self._parts.pinning.set_fill(ref_text, mode)

    async def pause(self, ref_text: str, *, paused: bool) -> None:
        """Fetch nothing of a ref in the background, from now on and after every start; or again. KeyError."""
        await self._parts.pinning.pause(ref_text, paused=paused)

    async def pause_all(self, *, paused: bool) -> None:
        """Fetch nothing at all in the background; or again what is not paused by itself."""
        await self._parts.pinning.pause_all(paused=paused)

    @property
    def all_paused(self) -> bool:
        """Whether nothing at all is fetched in the background."""
        return self._parts.catalog.all_paused

    async def remove(self, ref_text: str) -> int:
        """Forget a ref and delete what only it had; the bytes freed. KeyError if it is not pinned."""
        return await self._parts.pinning.remove(ref_text)

    async def headers_ready(self, ref_text: str, *, within: float = HEADERS_SECONDS) -> bool:
        """Wait until what `add` fetches in the background is there, or was given up. False: it took too long."""
        stored = self._parts.catalog.ref(ref_text)
        with trio.move_on_after(within) as scope:
            await self._parts.headers.ready(ref_text if stored is None else stored.manifest.ref)
        return not scope.cancelled_caught

    async def details(self, ref_text: str, *, fetch: bool = False) -> RefDetails:
        """What its cached headers say about a ref; with `fetch`, those that are missing are fetched. KeyError."""
        return await self._parts.details.details(self._parts.catalog.known(ref_text).manifest, fetch=fetch)

    async def tensor_map(self, ref_text: str, *, layers: bool = False, fetch: bool = False) -> dict[str, Any]:
        """Where the tensors of a ref lie and how much of each is cached, as plain values. KeyError."""
        return await self._parts.details.tensor_map(
            self._parts.catalog.known(ref_text).manifest, layers=layers, fetch=fetch
        )

    async def chunk_map(self, ref_text: str) -> dict[str, Any]:
        """Which chunks of a ref are there or on their way, as plain values. KeyError."""
        manifest = self._parts.catalog.known(ref_text).manifest
        return await self._parts.details.chunk_map(manifest, self._parts.overview.flying())

    async def complete(self, ref_text: str) -> None:
        """Fetch all of a ref and wait until it is sealed. KeyError, ReadError, IntegrityError."""
        await self._parts.upkeep.complete(ref_text)

    async def verify(
        self, ref_text: str, *, repair: bool, on_progress: Callable[[VerifyProgress], None] = lambda _: None
    ) -> VerifyReport:
        """Compare what is cached with the records. KeyError, CacheError; ReadError if a repair fails."""
        return await self._parts.upkeep.verify(ref_text, repair=repair, on_progress=on_progress)

    async def repair(
        self, ref_text: str, *, on_progress: Callable[[VerifyProgress], None] = lambda _: None
    ) -> RepairReport:
        """Fetch again what is bad on the disk or quarantined. KeyError, CacheError, ReadError."""
        return await self._parts.repair.repair(ref_text, on_progress)

    async def gc(self, *, dry_run: bool = False) -> GcReport:
        """Evict what is too old or beyond the limits; or only say what that is."""
        return await self._parts.room.gc(dry_run=dry_run)

    # ---- what the mount asks

    @property
    def read_timeout(self) -> float:
        """The bound of reads that begin now, in seconds; 0: there is none."""
        return self._parts.settings.read_timeout

    def blob_status(self, id: BlobId) -> BlobStatus:  # noqa: A002 - the contract's name
        """The state of a blob. KeyError if there is none."""
        return self._parts.catalog.state(id).status()

    def backing(self, id: BlobId) -> Path | None:  # noqa: A002 - the contract's name
        """The cache file of a blob of which nothing is left to be checked: the kernel may read it. Else None.

        Not from a disk that has failed lately: what the kernel cannot read there it cannot have from the network.
        """
        state = self._parts.catalog.get(id)
        passed = state is not None and state.may_be_passed and self._parts.watch.state is Health.HEALTHY
        return state.path if state is not None and passed else None

    def statfs(self) -> CacheSpace:
        """Room of the cache's filesystem, a few seconds ago."""
        return self._parts.room.space

    def read_nowait(self, id: BlobId, span: ByteSpan) -> bytes | None:  # noqa: A002 - the contract's name
        """The same as `read`, if nothing has to be waited for; else None, and nothing was done."""
        state = self._parts.catalog.get(id)
        return None if state is None else self._parts.reader.read_nowait(state, span)

    async def read(self, id: BlobId, span: ByteSpan) -> bytes:  # noqa: A002 - the contract's name
        """Exactly the bytes of `span`, clipped at the end of the blob. ReadError within `read_timeout`."""
        state = self._parts.catalog.get(id)
        if state is None:
            raise ReadError("the model was removed", kind=FailureKind.CANCELLED)
        try:
            return await self._parts.reader.read(state, span)
        except ReadError as error:
            self._parts.tally.read_failures[error.kind] += 1
            raise

    def refuted(self, id: BlobId) -> int:  # noqa: A002 - the contract's name
        """How often the blob was found to be wrong as a whole, since the start; 0 if there is none."""
        state = self._parts.catalog.get(id)
        return 0 if state is None else state.refuted

    def opened(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """A handle was opened: fetch head and tail, and fill if the mode says so. Never waits, never fails."""
        self._parts.readership.opened(id)

    def released(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """A handle was released."""
        self._parts.readership.released(id)

    # ---- looking at it

    def status(self) -> EngineStatus:
        """A snapshot of everything."""
        return self._parts.overview.status()

    async def measures(self) -> Measures:
        """What is counted and measured, for machines. Readers have their turns meanwhile."""
        return await self._parts.overview.measures()

    def explain(self, id: BlobId, span: ByteSpan) -> WaitStatus | None:  # noqa: A002 - the contract's name
        """Why a read of `span` has not been answered; its `str` is one line. None if the blob was removed."""
        return self._parts.overview.explain(id, span)

    def fetches(self) -> tuple[FetchStatus, ...]:
        """What is in flight, oldest first."""
        return self._parts.overview.fetches()

    async def probe(self) -> None:
        """Return when the index has answered a question, in one of the threads that reads use too. CacheError."""
        nobody = BlobId(bytes(16))
        await trio.to_thread.run_sync(self._parts.cache.blob, nobody, abandon_on_cancel=True)

    def check(self) -> list[str]:
        """Sentences about anything in memory that should not be; empty if all is well and nothing is in flight."""
        return self._parts.overview.check()

    async def quiet(self) -> None:
        """Wait until nothing is in flight and everything is durable and sealed as far as it can be. For tests."""
        await self._parts.quiet()


@asynccontextmanager
async def open_engine(cache: Cache, settings: EngineSettings) -> AsyncIterator[Engine]:
    """An engine over an open cache, for as long as the block runs. What landed is committed before it returns."""
    engine: Engine | None = None
    try:
        async with one_cause(), trio.open_nursery() as nursery:
            engine = Engine(cache, settings, nursery)
            try:
                await engine._parts.start()
                yield engine
            finally:
                await engine._parts.close()
    finally:
        if engine is not None:
            await engine._parts.flush()
            engine._parts.memory.close()

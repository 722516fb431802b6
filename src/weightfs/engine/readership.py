"""Who has a blob open, and what is fetched because of that: its first and last chunk, and what the mode says.

Rule: opening and releasing neither wait nor fail.
"""

from __future__ import annotations

import logging

import trio

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.pinning import Pinning
from weightfs.engine.room import Room
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import CacheError

log = logging.getLogger(__name__)


class Readership:
    """One per engine."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        fetcher: Fetcher,
        holdings: Holdings,
        room: Room,
        keeper: Keeper,
        watch: DiskWatch,
        pinning: Pinning,
        settings: EngineSettings,
        nursery: trio.Nursery,
    ) -> None:
        self._catalog = catalog
        self._fetcher = fetcher
        self._holdings = holdings
        self._room = room
        self._keeper = keeper
        self._watch = watch
        self._pinning = pinning
        self._settings = settings
        self._nursery = nursery

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
            if not state.handles and self._pinning.left(id):
                self._nursery.start_soon(self._pinning.tidy)

    @staticmethod
    def _used(state: BlobState) -> None:
        if state.may_be_passed:  # the kernel does not say what it reads of it
            state.touch(state.shape.chunks)

    async def _open(self, state: BlobState) -> None:
        state.filling = state.filling or self._settings.fill is FillMode.OPENED
        if self._watch.bypassed:
            return  # `Keeper.revive` comes back to it
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

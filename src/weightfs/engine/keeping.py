"""Which blobs are completed although nobody reads them: those of the mode `all`, and those of pinned refs.

Rules: what a pin or a mode has put in line stays there for as long as anybody else wants it: taking it back never stops
what an open file, a `pull` or the policy `hold` waits for. What is paused keeps its place in line and gets nothing;
readers do not notice, and a `pull` goes on: somebody waits for it. A ref may have 100,000 files: a few at a time have
their cache files made, and wait to be fetched.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import trio

from weightfs.core import plan
from weightfs.core.manifest import BlobId, Policy
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import CacheError

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # a file that cannot be made (a full disk) is tried again so often
FILES_AT_ONCE = 16  # that are being made: as many as a pool of disk threads


class Keeper:
    """One per engine."""

    def __init__(
        self,
        catalog: Catalog,
        planner: Planner,
        fetcher: Fetcher,
        holdings: Holdings,
        settings: EngineSettings,
        nursery: trio.Nursery,
    ) -> None:
        self._catalog = catalog
        self._planner = planner
        self._fetcher = fetcher
        self._holdings = holdings
        self._settings = settings
        self._nursery = nursery
        self._line: OrderedDict[BlobId, BlobState] = OrderedDict()  # whose files are to be made next
        self._at_work = 0

    def begin(self, state: BlobState) -> None:
        """Complete the blob in the background if it is to be kept."""
        self.weigh(state)
        if not self._wanted(state):
            return
        state.filling = True  # also of a whole one: a chunk that the disk loses is fetched again
        if not state.sealed:
            self._put_in_line(state)

    def rest(self, state: BlobState) -> None:
        """The blob may have lost its pin or its mode: fetch no more of it than somebody asks for."""
        opened = state.handles and self.mode(state) is not FillMode.NEVER
        asked_for = opened or state.completing or state.policy is Policy.HOLD
        if state.filling and not asked_for and not self._wanted(state) and self._holdings.pinned(state):
            state.filling = False
            self._fetcher.feed(plan.Fill(state.id, on=False))

    def weigh(self, state: BlobState) -> None:
        """Its refs may have been paused or resumed, or a `pull` of it began or ended."""
        if not self._planner.knows(state.id):
            return
        on = self._catalog.is_paused(state.id) and not state.completing
        if self._planner.paused(state.id) != on:
            self._fetcher.feed(plan.Pause(state.id, on=on))

    def revive(self) -> None:
        """The disk takes what is fetched again: go on with what is to be completed, whoever wanted it."""
        for state in self._catalog.states():
            if state.filling and not state.complete:
                self._put_in_line(state)

    def mode(self, state: BlobState) -> FillMode:
        """How much of the blob is completed. Commands on an idle cache do only what they are for."""
        return self._catalog.mode(state.id) if self._settings.keep_pinned else self._settings.fill

    def _wanted(self, state: BlobState) -> bool:
        if self._settings.keep_pinned and self._catalog.is_kept(state.id):
            return True
        mode = self.mode(state)
        return mode is FillMode.ALL or (mode is FillMode.OPENED and state.handles > 0)

    def _put_in_line(self, state: BlobState) -> None:
        self._line[state.id] = state
        if self._at_work < FILES_AT_ONCE:
            self._at_work += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        try:
            while self._line:
                await self._keep(self._line.popitem(last=False)[1])
        finally:
            self._at_work -= 1

    async def _keep(self, state: BlobState) -> None:
        if not state.filling or not self._holdings.pinned(state):
            return  # nobody wants it any more
        try:
            await self._holdings.fill(state)
        except CacheError as error:
            log.error("%s", error)
            await trio.sleep(RETRY_SECONDS)
            self._line.setdefault(state.id, state)

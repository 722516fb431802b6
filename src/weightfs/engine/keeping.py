"""Which blobs are completed although nobody reads them: those of the mode `all`, and those of pinned refs.

Rules: what a pin or a mode has put in line stays there for as long as anybody else wants it: taking it back never stops
what an open file, a `pull` or the policy `hold` waits for. What is paused keeps its place in line and gets nothing;
readers do not notice, and a `pull` goes on: somebody waits for it.
"""

from __future__ import annotations

import logging

import trio

from weightfs.core import plan
from weightfs.core.manifest import Policy
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import CacheError

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # a file that cannot be made (a full disk) is tried again so often


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

    def begin(self, state: BlobState) -> None:
        """Complete the blob in the background if it is to be kept."""
        self.weigh(state)
        if not self._wanted(state):
            return
        state.filling = True  # also of a whole one: a chunk that the disk loses is fetched again
        if not state.sealed:
            self._nursery.start_soon(self._keep, state)

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
                self._nursery.start_soon(self._fill_again, state)

    def mode(self, state: BlobState) -> FillMode:
        """How much of the blob is completed. Commands on an idle cache do only what they are for."""
        return self._catalog.mode(state.id) if self._settings.keep_pinned else self._settings.fill

    def _wanted(self, state: BlobState) -> bool:
        if self._settings.keep_pinned and self._catalog.is_kept(state.id):
            return True
        mode = self.mode(state)
        return mode is FillMode.ALL or (mode is FillMode.OPENED and state.handles > 0)

    async def _keep(self, state: BlobState) -> None:
        while self._wanted(state) and self._holdings.pinned(state):
            try:
                await self._holdings.fill(state)
            except CacheError as error:
                log.error("%s", error)
                await trio.sleep(RETRY_SECONDS)
            else:
                return

    async def _fill_again(self, state: BlobState) -> None:
        try:
            await self._holdings.fill(state)
        except CacheError as error:
            log.error("%s", error)

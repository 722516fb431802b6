"""Which blobs are completed although nobody reads them: all of them by the mode `all`, and those of pinned refs.

Rule: what a pin has put in line stays there for as long as anybody else wants it: taking the pin back never stops what
an open file, a `pull` or the policy `hold` waits for.
"""

from __future__ import annotations

import logging

import trio

from weightfs.core import plan
from weightfs.core.manifest import Policy
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
        fetcher: Fetcher,
        holdings: Holdings,
        settings: EngineSettings,
        nursery: trio.Nursery,
    ) -> None:
        self._catalog = catalog
        self._fetcher = fetcher
        self._holdings = holdings
        self._settings = settings
        self._nursery = nursery

    def begin(self, state: BlobState) -> None:
        """Complete the blob in the background if it is to be kept."""
        if not self._wanted(state):
            return
        state.filling = True  # also of a whole one: a chunk that the disk loses is fetched again
        if not state.sealed:
            self._nursery.start_soon(self._keep, state)

    def rest(self, state: BlobState) -> None:
        """The blob may have lost its pin: fetch no more of it than somebody asks for."""
        asked_for = state.handles or state.completing or state.policy is Policy.HOLD
        if state.filling and not asked_for and not self._wanted(state) and self._holdings.pinned(state):
            state.filling = False
            self._fetcher.feed(plan.Fill(state.id, on=False))

    def _wanted(self, state: BlobState) -> bool:
        kept = self._settings.keep_pinned and self._catalog.is_kept(state.id)
        return kept or self._settings.fill is FillMode.ALL

    async def _keep(self, state: BlobState) -> None:
        while self._wanted(state) and self._holdings.pinned(state):
            try:
                await self._holdings.fill(state)
            except CacheError as error:
                log.error("%s", error)
                await trio.sleep(RETRY_SECONDS)
            else:
                return

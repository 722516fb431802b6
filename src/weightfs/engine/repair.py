"""`weightfs repair`: what is bad on the disk, or quarantined, is fetched again and proven.

Rules: only what is known to be wrong is dropped. Of a disk's fault that is the chunk. Of a quarantined file nobody
knows which chunk is wrong, and nobody may read it: all of its chunks are fetched again, each from another mirror than
the one that gave it, if there is one. What differs from what was there before names the wrong chunks and their mirror.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from weightfs.core import plan
from weightfs.core.manifest import Trust
from weightfs.core.ref import without_secrets
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.committer import Committer
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.status import Mended, RepairReport, VerifyProgress
from weightfs.engine.uncached import Uncached
from weightfs.engine.upkeep import Upkeep
from weightfs.errors import IntegrityError
from weightfs.store.cache import Cache

log = logging.getLogger(__name__)


class Repair:
    """One per engine; holds nothing but its colleagues."""

    def __init__(
        self,
        cache: Cache,
        catalog: Catalog,
        fetcher: Fetcher,
        uncached: Uncached,
        holdings: Holdings,
        committer: Committer,
        upkeep: Upkeep,
    ) -> None:
        self._cache = cache
        self._catalog = catalog
        self._fetcher = fetcher
        self._uncached = uncached
        self._holdings = holdings
        self._committer = committer
        self._upkeep = upkeep

    async def repair(self, ref: str, on_progress: Callable[[VerifyProgress], None]) -> RepairReport:
        """Make a ref right. KeyError if it is unknown; CacheError; ReadError if something cannot be fetched."""
        files = {state.id: (path, state) for path, state in self._catalog.files(ref)}
        mended: list[Mended] = []
        for path, state in files.values():
            if state.trust is Trust.QUARANTINED:
                mended += await self._take_anew(path, state)
        report = await self._upkeep.verify(ref, repair=True, on_progress=on_progress)
        faults = {path: state.faults.counts for path, state in files.values() if state.faults.counts}
        return RepairReport(report, tuple(mended), faults)

    async def _take_anew(self, path: str, state: BlobState) -> list[Mended]:
        """Fetch all of a quarantined file; the chunks that are others now. Whether it is right, its trust says."""
        log.info("fetching all of %s of %s again, from elsewhere if it is to be had there", path, state.ref)
        before, sources = await trio.to_thread.run_sync(self._recorded, state)
        state.trust, state.doubted = state.blob.initial_trust, False
        self._committer.judged(state.id, state.trust)
        self._fetcher.feed(plan.Refuted(state.id, sources))
        self._uncached.refuted(state, sources)
        await self._holdings.drop(state, list(state.present))
        state.notify()
        state.completing += 1
        try:
            await self._upkeep.complete_file(path, state)
        except IntegrityError as error:
            log.error("%s", error)  # it is quarantined again, and the report says so
            return []
        finally:
            state.completing -= 1
        after, now_from = await trio.to_thread.run_sync(self._recorded, state)
        found = [chunk for chunk, digest in before.items() if after.get(chunk) != digest]
        for chunk in found:
            state.faults.refuted(sources.get(chunk))
            log.warning(
                "chunk %d of %s was wrong as mirror %s gave it; it is right from %s (fault of the origin)",
                chunk, state.ref, _url(state, sources.get(chunk)), _url(state, now_from.get(chunk)),
            )  # fmt: skip
        return [
            Mended(path, chunk, _url(state, sources.get(chunk)), _url(state, now_from.get(chunk)))
            for chunk in found
        ]

    def _recorded(self, state: BlobState) -> tuple[dict[int, bytes], dict[int, int]]:
        return (
            self._cache.digests(state.id, state.shape.chunks),
            self._cache.sources(state.id, state.shape.chunks),
        )


def _url(state: BlobState, mirror: int | None) -> str:
    known = mirror is not None and mirror < len(state.mirrors)
    return without_secrets(state.mirrors[mirror].url) if known and mirror is not None else ""

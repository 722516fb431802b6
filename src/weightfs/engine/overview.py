"""The engine looked at from outside: its status, its measures, what is in flight, and whether all of it agrees.

Rule: looking changes nothing, and is from memory. `measures` and `survey` let readers come between, for there may be
100,000 files; the rest answers at once.
"""

from __future__ import annotations

import os

import trio

from weightfs import __version__
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.core.planner import Planner
from weightfs.engine.catalog import Catalog
from weightfs.engine.committer import Committer
from weightfs.engine.explain import FetchStatus, WaitStatus, describe_fetches, explain_wait
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.measures import Measures, measure
from weightfs.engine.report import RefReport, describe_jobs
from weightfs.engine.room import Room
from weightfs.engine.status import EngineStatus
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.engine.workers import WorkerPool
from weightfs.store.cache import Cache


class Overview:
    """One per engine; holds nothing but its colleagues, and when it began."""

    def __init__(
        self,
        *,
        cache: Cache,
        catalog: Catalog,
        planner: Planner,
        pool: WorkerPool,
        fetcher: Fetcher,
        uncached: Uncached,
        committer: Committer,
        holdings: Holdings,
        room: Room,
        watch: DiskWatch,
        tally: Tally,
    ) -> None:
        self._started = trio.current_time()
        self._cache = cache
        self._catalog = catalog
        self._planner = planner
        self._pool = pool
        self._fetcher = fetcher
        self._uncached = uncached
        self._committer = committer
        self._holdings = holdings
        self._room = room
        self._watch = watch
        self._tally = tally

    def status(self) -> EngineStatus:
        """A snapshot of everything."""
        report = RefReport(self._catalog, self._planner, trio.current_time(), None)
        for _ in report.turns():
            pass
        return self._status(report)

    async def survey(self, files_at_most: int | None) -> EngineStatus:
        """The same, not of one moment: readers come between. Of each ref at most so many files."""
        report = RefReport(self._catalog, self._planner, trio.current_time(), files_at_most)
        for _ in report.turns():
            await trio.lowlevel.checkpoint()
        return self._status(report)

    def _status(self, report: RefReport) -> EngineStatus:
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
            refs=tuple(report.refs),
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

    def flying(self) -> dict[BlobId, list[ChunkSpan]]:
        """What is in flight, by blob."""
        flying: dict[BlobId, list[ChunkSpan]] = {}
        for job in self._planner.jobs(trio.current_time()):
            flying.setdefault(job.blob, []).append(job.chunks)
        return flying

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

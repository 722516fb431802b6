"""Makes what landed durable, in batches: data first, then the index (`store.Cache.commit` owns that order).

Readers wait for visible, not for durable: a crash loses some records, never the truth. What could not be committed is
given up as lost: a failed fsync is told once, and what it was about may be gone. The planner's unsettled bound keeps
this queue short.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from weightfs.core.chunkset import ChunkSet
from weightfs.core.manifest import BlobId, Trust
from weightfs.engine.settings import EngineSettings
from weightfs.errors import CacheError, IntegrityError, WeightfsError
from weightfs.store.cache import Cache, Landing, RunState

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


@dataclass(slots=True)
class Batch:
    """What one commit makes durable: landings with their bytes, running hashes, trust states, re-hashed chunks."""

    landings: list[tuple[Landing, int]] = field(default_factory=list)
    lives: dict[BlobId, int] = field(default_factory=dict)  # of the file, when the first landing was queued
    runs: dict[BlobId, RunState] = field(default_factory=dict)
    trusts: dict[BlobId, Trust] = field(default_factory=dict)
    rehashed: dict[BlobId, ChunkSet] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.landings or self.runs or self.trusts or self.rehashed)

    @property
    def nbytes(self) -> int:
        """Bytes of the landings."""
        return sum(nbytes for _, nbytes in self.landings)

    def forget(self, blob: BlobId, chunks: set[int] | None = None) -> int:
        """Take out a blob (or some of its chunks) that is being removed; the bytes of the landings taken out."""
        before = self.nbytes
        self.landings = [
            (landing, nbytes)
            for landing, nbytes in self.landings
            if landing.blob != blob or (chunks is not None and landing.chunk not in chunks)
        ]
        if not any(landing.blob == blob for landing, _ in self.landings):
            self.lives.pop(blob, None)  # what is queued next may be of a later one
        if blob in self.rehashed and chunks is not None:
            for chunk in chunks:
                self.rehashed[blob].discard(chunk)
        if chunks is None:
            self.runs.pop(blob, None)
            self.trusts.pop(blob, None)
            self.rehashed.pop(blob, None)
        return before - self.nbytes


class Committer:
    """One per engine. After each batch, `committed(batch)` is called if it is durable, else `lost(batch, error)`."""

    def __init__(
        self,
        cache: Cache,
        settings: EngineSettings,
        committed: Callable[[Batch], None],
        lost: Callable[[Batch, WeightfsError], Awaitable[None]],
    ) -> None:
        self._cache = cache
        self._settings = settings
        self._committed = committed
        self._lost = lost
        self._batch = Batch()
        self._gathered = 0  # bytes in the batch
        self._some = trio.Event()
        self._enough = trio.Event()
        self._lock = trio.Lock()  # one commit at a time; never held across network I/O
        self.trouble: WeightfsError | None = None

    @property
    def pending(self) -> int:
        """Landed chunks that are not durable yet (of the batch that is being gathered)."""
        return len(self._batch.landings)

    def landed(self, landing: Landing, nbytes: int, life: int) -> None:
        """Queue a visible chunk, written in this `life` of its file."""
        self._batch.lives.setdefault(landing.blob, life)
        self._batch.landings.append((landing, nbytes))
        self._gathered += nbytes
        self._some.set()
        if self._gathered >= self._settings.commit_bytes:
            self._enough.set()

    def hasten(self) -> None:
        """Commit what is queued now: a blob has its last chunk, and nothing more will come to fill the batch."""
        self._enough.set()

    def progressed(self, blob: BlobId, run: RunState) -> None:
        """Queue the state of the running hash. It covers durable chunks only."""
        self._batch.runs[blob] = run
        self._some.set()

    def judged(self, blob: BlobId, trust: Trust) -> None:
        """Queue a change of trust."""
        self._batch.trusts[blob] = trust
        self._some.set()

    def rehashed(self, blob: BlobId, chunk: int, count: int) -> None:
        """Queue that a chunk of an older epoch was found to be as recorded."""
        self._batch.rehashed.setdefault(blob, ChunkSet(count)).add(chunk)
        self._some.set()

    async def run(self) -> None:
        """Until cancelled; the owner then calls `flush` once more."""
        while True:
            await self._some.wait()
            with trio.move_on_after(self._settings.commit_seconds):
                await self._enough.wait()
            if not await self.flush():
                await trio.sleep(RETRY_SECONDS)

    async def flush(self) -> bool:
        """Make durable what is queued now. False if the cache could not; then it was given up as lost."""
        async with self._lock:
            batch, self._batch, self._gathered = self._batch, Batch(), 0
            self._some.set()  # somebody else may be flushing while `run` waits for this very event
            self._some, self._enough = trio.Event(), trio.Event()
            if not batch:
                return True
            try:
                with trio.CancelScope(shield=True):  # a thread that commits cannot be abandoned
                    await trio.to_thread.run_sync(self._commit, batch)
            except (CacheError, IntegrityError) as error:
                if self.trouble is None:
                    log.error("cannot commit %d chunks to the index: %s", len(batch.landings), error)
                self.trouble = error
                self._keep_verdicts(batch)
            else:
                self.trouble = None
        if self.trouble is not None:  # outside the lock: dropping takes it
            with trio.CancelScope(shield=True):
                await self._lost(batch, self.trouble)
            return False
        self._committed(batch)
        return True

    def _keep_verdicts(self, batch: Batch) -> None:
        """What a failed commit said besides landings is still true, and is tried again; newer words outrank it."""
        self._batch.runs = batch.runs | self._batch.runs
        self._batch.trusts = batch.trusts | self._batch.trusts
        for blob, chunks in batch.rehashed.items():
            chunks.union(self._batch.rehashed.get(blob, ChunkSet(chunks.count)))
            self._batch.rehashed[blob] = chunks
        if self._batch:
            self._some.set()

    def _commit(self, batch: Batch) -> None:
        self._cache.commit(
            [landing for landing, _ in batch.landings],
            runs=batch.runs,
            trusts=batch.trusts,
            rehashed=batch.rehashed,
            now=int(time.time()),
        )

    async def forget(self, blob: BlobId, chunks: set[int] | None = None) -> int:
        """Take a blob (or these chunks of it) out of the queue; waits for a running commit.

        Returns the bytes of the landings taken out.
        """
        async with self._lock:
            return self._batch.forget(blob, chunks)

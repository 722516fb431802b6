"""The life of a chunk after it landed: visible, durable, suspect, dropped. One place owns every transition.

Rules: what is taken from readers leaves memory before it leaves the index, and the index before the file; nobody may
write a dropped chunk before it has left all three. `BlobState.generation` counts drops: whoever read bytes across one
must not use them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.committer import Batch, Committer
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.running import SAVABLE, RunningSha256
from weightfs.errors import CacheError, DiskFault
from weightfs.store.cache import Cache, ChunkState, Landing, RunState

log = logging.getLogger(__name__)


class Holdings:
    """One per engine.

    `look_up` finds the state of a blob that is still pinned; `durable` is told of each blob of which more became
    durable.
    """

    def __init__(
        self,
        cache: Cache,
        planner: Planner,
        look_up: Callable[[BlobId], BlobState | None],
        durable: Callable[[BlobState], None],
    ) -> None:
        self._cache = cache
        self._planner = planner
        self._look_up = look_up
        self._tell_durable = durable
        self._fetcher: Fetcher
        self._committer: Committer
        self.disk_faults = 0

    def connect(self, fetcher: Fetcher, committer: Committer) -> None:
        """The two that call back into this one; before anything else."""
        self._fetcher = fetcher
        self._committer = committer

    async def prepare(self, state: BlobState) -> bool:
        """Make sure that the sparse file has its full length. False, with a log line, if it cannot be made."""
        if not state.prepared and self._planner.knows(state.id):
            try:
                await self._prepare(state)
            except CacheError as error:
                log.error("%s", error)
                return False
            state.prepared = True
        return self._planner.knows(state.id)

    async def _prepare(self, state: BlobState) -> None:
        try:
            await trio.to_thread.run_sync(self._cache.prepare, state.id)
        except DiskFault as error:
            log.warning("%s; fetching all of %s again", error, state.ref)
            await self.drop_bad(state, list(state.present))
            await trio.to_thread.run_sync(self._cache.prepare, state.id)
        if state.blob.chunk_list is None:
            state.required = await trio.to_thread.run_sync(
                self._cache.required_digests, state.id, state.shape.chunks
            )

    async def fill(self, state: BlobState) -> None:
        """Put the blob in line for background fill."""
        state.filling = True
        if await self.prepare(state) and not state.complete:
            self._fetcher.feed(plan.Fill(state.id, on=True))

    def landed(self, state: BlobState, chunk: int, digest: bytes) -> None:
        """The chunk is written; the planner hears of it next, and wakes its readers."""
        nbytes = len(state.shape.span_of(chunk))
        state.present_bytes += nbytes
        kind = ChunkState.LISTED if state.blob.chunk_list is not None else ChunkState.LANDED
        self._committer.landed(Landing(state.id, chunk, digest, kind, 0), nbytes)

    def committed(self, batch: Batch) -> None:
        """The batch is on disk and in the index."""
        settled: dict[BlobId, int] = {}
        for landing, nbytes in batch.landings:
            settled[landing.blob] = settled.get(landing.blob, 0) + nbytes
            state = self._look_up(landing.blob)
            if state is not None and landing.chunk in state.present:
                state.durable.add(landing.chunk)
        for blob, nbytes in settled.items():
            self._fetcher.feed(plan.Durable(blob, nbytes))
            if state := self._look_up(blob):
                self._tell_durable(state)
                state.notify()

    def cleared(self, state: BlobState, chunks: Iterable[int]) -> None:
        """These chunks were hashed, and are as recorded."""
        for chunk in chunks:
            if chunk in state.suspect:
                state.suspect.discard(chunk)
                self._committer.rehashed(state.id, chunk, state.shape.chunk_count)

    async def drop_bad(self, state: BlobState, chunks: list[int]) -> None:
        """Drop what the disk did not keep."""
        self.disk_faults += len(chunks)
        await self.drop(state, chunks)

    async def drop(self, state: BlobState, chunks: Iterable[int]) -> None:
        """Make holes; they are fetched again when needed, or now if the blob is being filled.

        Without a trusted list, the bytes that come next may be others than the running hash has taken: it starts anew.
        """
        gone = [chunk for chunk in chunks if chunk in state.present]
        if not gone:
            return
        state.generation += 1
        self._fetcher.feed(plan.Dropped(state.id, gone))
        for chunk in gone:
            state.durable.discard(chunk)
            state.suspect.discard(chunk)
            state.present_bytes -= len(state.shape.span_of(chunk))
        with trio.CancelScope(shield=True):  # half a drop would leave chunks that nobody may fetch
            unsettled = await self._committer.forget(state.id, set(gone))
            self._distrust(state, min(gone))
            await trio.to_thread.run_sync(self._punch, state, gone)
            if state.blob.chunk_list is None:
                state.required |= await trio.to_thread.run_sync(self._required, state, gone)
        self._fetcher.feed(plan.Durable(state.id, unsettled))
        self._fetcher.feed(plan.Punched(state.id, gone))
        if state.filling and self._planner.knows(state.id):
            self._fetcher.feed(plan.Fill(state.id, on=True))

    def _distrust(self, state: BlobState, first: int) -> None:
        trusted = state.blob.chunk_list is not None and state.blob.chunk_list.trusted
        if trusted or first >= state.frontier or state.trust is Trust.QUARANTINED:
            return
        state.trust = state.blob.initial_trust
        self._committer.judged(state.id, state.trust)
        state.run = self.restart_hash(state)

    def restart_hash(self, state: BlobState) -> RunState | None:
        """The running SHA-256 at the beginning; queued for the index."""
        run = RunState(0, RunningSha256(None, 0).state()) if SAVABLE else None
        if run:
            self._committer.progressed(state.id, run)
        return run

    def _required(self, state: BlobState, chunks: list[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for chunk in chunks:
            found |= self._cache.required_digests(state.id, ChunkSpan(chunk, chunk + 1))
        return found

    async def lost(self, batch: Batch) -> None:
        """A commit failed: what the index does not have is no longer believed to be on disk (fsync tells only once)."""
        for blob in {landing.blob for landing, _ in batch.landings}:
            state = self._look_up(blob)
            if state is None:
                continue
            progress = await trio.to_thread.run_sync(self._cache.progress, blob)
            mine = [(landing, nbytes) for landing, nbytes in batch.landings if landing.blob == blob]
            recorded = Batch([entry for entry in mine if entry[0].chunk in progress.present])
            self.committed(recorded)
            gone = [entry for entry in mine if entry[0].chunk not in progress.present]
            await self.drop(state, [landing.chunk for landing, _ in gone])
            self._fetcher.feed(plan.Durable(blob, sum(nbytes for _, nbytes in gone)))

    def _punch(self, state: BlobState, chunks: list[int]) -> None:
        for chunk in chunks:
            self._cache.drop(state.id, ChunkSpan(chunk, chunk + 1))

"""The life of a chunk after it landed: visible, durable, suspect, dropped. One place decides on every transition.

Rules: a landed chunk is visible at once, and durable when file and index have it. What a failed commit leaves
unrecorded is dropped, and so is all that a lost file had. `BlobState.life` counts the files of a blob: what was begun
in one has not landed in the next. `dropping` has the order in which chunks go.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

import trio

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import Blob, BlobId, Trust
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.causes import failure_of, kind_of
from weightfs.engine.committer import Batch, Committer
from weightfs.engine.dropping import Dropper, Owed, Way
from weightfs.engine.fetcher import Fetcher
from weightfs.errors import (
    CacheError,
    FailureKind,
    LostFileError,
    WeightfsError,
)
from weightfs.logs import about
from weightfs.store.cache import Cache, ChunkState, Landing, RunState

log = logging.getLogger(__name__)

# The identity of no file: whatever begins to fetch into it finds none, and is planned again.
_NO_FILE = (0, 0)


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
        nursery: trio.Nursery,
    ) -> None:
        self._cache = cache
        self._nursery = nursery
        self._planner = planner
        self._look_up = look_up
        self._tell_durable = durable
        self._fetcher: Fetcher
        self._dropper: Dropper
        self._committer: Committer
        self._relieve: Callable[[BlobState, int], Awaitable[bool]]
        self.disk_failed: Callable[[Exception], None]
        self.disk_faults = 0

    def connect(
        self,
        fetcher: Fetcher,
        committer: Committer,
        relieve: Callable[[BlobState, int], Awaitable[bool]],
        disk_failed: Callable[[Exception], None],
    ) -> None:
        """The two that call back into this one, and who is told of a full and of a sick disk; before anything else."""
        self._fetcher = fetcher
        self._committer = committer
        self._relieve = relieve
        self.disk_failed = disk_failed
        self._dropper = Dropper(
            self._cache, self._planner, fetcher, committer, self.pinned, disk_failed, self._nursery
        )

    def pinned(self, state: BlobState) -> bool:
        """Whether the blob is still there, and this is its state: it may have been removed, and added again."""
        return self._look_up(state.id) is state

    async def prepare(self, state: BlobState) -> bool:
        """Make sure of the sparse file at its full length. False if the blob was removed.

        CacheError if the file cannot be made.
        """
        if not state.prepared:
            async with state.preparing:
                await self._prepare_once(state)
        return self.pinned(state)

    async def _prepare_once(self, state: BlobState) -> None:
        if state.prepared or not self.pinned(state):
            return
        try:
            await self._prepare(state)
        except CacheError:
            if self.pinned(state):
                raise
        else:
            state.prepared = True

    async def _prepare(self, state: BlobState) -> None:
        try:
            file, required = await trio.to_thread.run_sync(self._make_file, state)
            if state.file not in (None, _NO_FILE, file):
                raise LostFileError(f"the cache file {state.path} was replaced")
        except LostFileError as error:
            log.warning(
                "%s; fetching all of %s again", error, state.ref, extra=about(ref=state.ref, blob=state.id)
            )
            await self._forget_file(state)
            file, required = await trio.to_thread.run_sync(self._make_file, state)
            self._dropper.new_life(state)
        if state.file == _NO_FILE:
            self._dropper.new_life(state)  # what has begun meanwhile found no file
        state.file = file
        if state.blob.chunk_list is None:
            state.required = required

    def _make_file(self, state: BlobState) -> tuple[tuple[int, int] | None, dict[int, bytes]]:
        self._cache.prepare(state.id)
        # Only when `_doubt` has taken from readers what was not recorded: it becomes holes.
        if state.file == _NO_FILE and (doubt := self._cache.doubt(state.id)) is not None:
            self._cache.renew(state.id)
            self._cache.forgive(state.id, doubt)
        wanted = state.blob.chunk_list is None
        required = self._cache.required_digests(state.id, state.shape.chunks) if wanted else {}
        return self._cache.file_identity(state.id), required

    async def mend(self, state: BlobState, life: int) -> bool:
        """Whether the file that counted in `life` was lost; a new one was made then. CacheError if it cannot be."""
        if state.life == life:
            state.prepared = False
            await self.prepare(state)
        return state.life != life

    async def _forget_file(self, state: BlobState) -> None:
        """The file is gone, cut, or another one: nothing in it counts."""
        self._dropper.new_life(state)
        gone = list(state.present)
        self.disk_faults += len(gone)
        state.faults.lost(len(gone))
        await self._dropper.drop(Owed(state, gone, Way.LOST))

    async def fill(self, state: BlobState) -> None:
        """Put the blob in line for background fill. CacheError if its file cannot be made."""
        state.filling = True
        if await self.prepare(state) and not state.complete:
            self._fetcher.fill(state)

    def landed(self, state: BlobState, chunk: int, digest: bytes, mirror: int) -> None:
        """The chunk is written, as this mirror gave it; the planner hears of it next, and wakes its readers."""
        nbytes = len(state.shape.span_of(chunk))
        state.present_bytes += nbytes
        state.touch(ChunkSpan(chunk, chunk + 1))
        kind = ChunkState.LISTED if state.blob.chunk_list is not None else ChunkState.LANDED
        self._committer.landed(Landing(state.id, chunk, digest, kind, min(mirror, 255)), nbytes, state.life)
        if state.present_bytes == state.shape.size:
            self._committer.hasten()

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
                state.relieved = 0
                state.whole = state.whole or state.durable.full
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
        state.faults.lost(len(chunks))
        await self.drop(state, chunks)

    async def drop(self, state: BlobState, chunks: Iterable[int]) -> None:
        """Make holes; they are fetched again when needed, or now if the blob is being filled.

        Without a trusted list, the bytes that come next may be others than the running hash has taken: it starts anew.
        """
        gone = [chunk for chunk in dict.fromkeys(chunks) if chunk in state.present]
        if gone and self.pinned(state):
            await self._dropper.drop(Owed(state, gone))

    async def settle(self) -> None:
        """Commit what has landed: who is whole, and what is proven, is then known before something is evicted."""
        await self._committer.flush()

    async def evict(
        self, state: BlobState, chunks: Iterable[int] | None, may: Callable[[], bool]
    ) -> tuple[int, int]:
        """Take chunks out of the cache, and give back their room; None: all, and the file.

        Returns the bytes of chunks whose room is free now, and the bytes that the disk has more.
        Nothing happens unless `may()` when it begins. What was proven binds what lands there later, as after any drop.
        """
        await self.settle()  # a proof that was not recorded yet would be gone with the chunks
        async with state.preparing:
            if not self.pinned(state) or not may():
                return 0, 0
            if state.filling:  # else it would be fetched again at once
                state.filling = False
                self._fetcher.feed(plan.Fill(state.id, on=False))
            if chunks is not None:
                owed = Owed(state, [chunk for chunk in chunks if chunk in state.durable], Way.PART)
                await self._dropper.drop(owed)
                return owed.room, owed.freed
            owed, file = Owed(state, list(state.present), Way.WHOLE), state.file
            state.prepared, state.file = False, _NO_FILE
            self._dropper.new_life(state)
            await self._dropper.drop(owed)
            if state.file == _NO_FILE:
                state.file = file  # the index could not be written, and the file stays
            return owed.room, owed.freed

    async def adopt(self, state: BlobState) -> None:
        """Believe of a known blob what the index was told since: a chunk list, and what that says of cached chunks.

        CacheError if the index cannot be read.
        """
        with trio.CancelScope(shield=True):  # the index has changed already
            durable = state.durable.copy()
            kept, recorded = await trio.to_thread.run_sync(self._recall, state)
            old = state.blob.chunk_list
            if kept is None or kept.chunk_list in (None, old) or not self.pinned(state):
                return
            state.blob = replace(state.blob, chunk_list=kept.chunk_list)
            if kept.initial_trust is Trust.ATTESTED and not (old is not None and old.trusted):
                durable.difference(recorded)
                await self._attest(state, [chunk for chunk in durable if chunk in state.present])

    def _recall(self, state: BlobState) -> tuple[Blob | None, ChunkSet]:
        return self._cache.blob(state.id), self._cache.progress(state.id).present

    async def _attest(self, state: BlobState, wrong: list[int]) -> None:
        """There is a trusted list now, and `wrong` are the chunks that it refuted: the rules of `store.merging`."""
        if wrong or state.trust not in (Trust.VERIFIED, Trust.QUARANTINED):
            state.trust = Trust.ATTESTED
        self._committer.judged(state.id, state.trust)  # instead of what was queued before
        if wrong and min(wrong) < state.frontier:
            state.run = self._dropper.restart_hash(state)
        self._fetcher.abandon(state)  # what is on its way is not compared with the list: planned anew
        if wrong:
            await self._dropper.drop(Owed(state, wrong))
        state.notify()

    def restart_hash(self, state: BlobState) -> RunState | None:
        """The running SHA-256 at the beginning; queued for the index."""
        return self._dropper.restart_hash(state)

    async def lost(self, batch: Batch, error: WeightfsError) -> None:
        """A commit failed: what the index does not have is no longer believed to be on disk (fsync tells only once)."""
        for blob in {landing.blob for landing, _ in batch.landings}:
            state = self._look_up(blob)
            if state is None:
                continue
            doubt = self._cache.doubt(blob)
            present = await trio.to_thread.run_sync(self._recorded, state)
            mine = [entry for entry in batch.landings if entry[0].blob == blob]
            self.committed(Batch([entry for entry in mine if entry[0].chunk in present]))
            gone = [entry for entry in mine if entry[0].chunk not in present]
            if not gone or not self.pinned(state):
                continue
            # First the hold: a fill would fetch again at once what cannot be kept.
            lost = await self._was_lost(state, batch.lives[blob], error)
            if not lost:
                self.disk_failed(error)
            failure = None if lost else failure_of(error)
            if failure and failure.kind is FailureKind.NO_SPACE and await self._relieve(state, 0):
                failure = None  # there is room now: fetched again, it may be recorded
            self._fetcher.feed(plan.Undone(blob, sum(nbytes for _, nbytes in gone), failure))
            chunks = [landing.chunk for landing, _ in gone]
            if doubt is None or lost:
                await self.drop(state, chunks)
            else:
                await self._doubt(state, chunks, batch.lives[blob])

    async def _doubt(self, state: BlobState, chunks: list[int], life: int) -> None:
        """A sync failed, and says so once: all that was written before it, or is on its way now, may not be there.

        What is fetched from now on is written after it, into a file that was renewed (`Cache.renew`).
        """
        if life != state.life:  # of before the failure that was seen to already
            await self.drop(state, chunks)
            return
        async with state.preparing:
            state.prepared, state.file = False, _NO_FILE  # until it was renewed
            self._dropper.new_life(state)
            undurable = [chunk for chunk in state.present if chunk not in state.durable]
            await self.drop(state, [*chunks, *undurable])
        try:
            await self.prepare(state)
        except CacheError as error:  # whoever wants to fetch something of it tries again
            self.disk_failed(error)

    async def _was_lost(self, state: BlobState, life: int, error: WeightfsError) -> bool:
        try:
            return kind_of(error) is FailureKind.DISK and await self.mend(state, life)
        except CacheError:
            return False

    def _recorded(self, state: BlobState) -> ChunkSet:
        try:
            return self._cache.progress(state.id).present
        except CacheError as error:
            log.error("cannot read what is recorded of %s: %s", state.ref, error)
            return ChunkSet(state.shape.chunk_count)

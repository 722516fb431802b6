"""Dropping: chunks that were there are taken from readers, and may be fetched again.

Rules: what is taken from readers leaves memory before it leaves the index, and the index before the file; nobody may
write a dropped chunk before it has left all three. `BlobState.generation` counts drops: whoever read bytes across one
must not use them. A drop that the index does not take is tried until it does.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.manifest import Trust
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.causes import failure_of
from weightfs.engine.committer import Committer
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.running import SAVABLE, RunningSha256
from weightfs.errors import CacheError
from weightfs.logs import about
from weightfs.store.cache import Cache, RunState

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Way(enum.Enum):
    """What becomes of the bytes of dropped chunks."""

    KEEP = enum.auto()  # they stay, until others are written over them
    PART = enum.auto()  # holes are punched, if nobody can have the file mapped
    WHOLE = enum.auto()  # the file loses its name, and there is a new one
    LOST = enum.auto()  # the file is lost, and is to be made anew


@dataclass(slots=True)
class Owed:
    """Chunks that left memory and have to leave index and file. Once they have: bytes of room and of disk set free."""

    state: BlobState
    chunks: list[int]
    way: Way = Way.KEEP
    room: int = 0
    freed: int = 0


class Dropper:
    """One per engine. `pinned` says whether a blob is still there, `disk_failed` is told of a sick disk."""

    def __init__(
        self,
        cache: Cache,
        planner: Planner,
        fetcher: Fetcher,
        committer: Committer,
        pinned: Callable[[BlobState], bool],
        disk_failed: Callable[[Exception], None],
        nursery: trio.Nursery,
    ) -> None:
        self._cache = cache
        self._planner = planner
        self._fetcher = fetcher
        self._committer = committer
        self._pinned = pinned
        self._disk_failed = disk_failed
        self._nursery = nursery

    async def drop(self, owed: Owed) -> None:
        """Take the chunks out of memory, index and file; of the last two later, if the index cannot be written now."""
        state, gone = owed.state, owed.chunks
        state.generation += 1
        self._fetcher.feed(plan.Dropped(state.id, gone))
        for chunk in gone:
            state.durable.discard(chunk)
            state.suspect.discard(chunk)
            state.present_bytes -= len(state.shape.span_of(chunk))
        if gone:  # before anything is awaited: the sealer must not go on from what it took of these chunks
            self._distrust(state, min(gone))
        with trio.CancelScope(shield=True):  # half a drop would leave chunks that nobody may fetch
            unsettled = await self._committer.forget(state.id, set(gone))
            self._fetcher.feed(plan.Undone(state.id, unsettled))
            if not await self._punch(owed) and not self._nursery.cancel_scope.cancel_called:
                if owed.way is Way.WHOLE:  # by then others may have landed in the file: it cannot go any more
                    owed = Owed(state, gone)
                self._nursery.start_soon(self._punch_later, owed)

    def new_life(self, state: BlobState) -> None:
        """What is being written now has not landed: told when the file is lost, and again when there is a new one."""
        state.life += 1
        self._fetcher.abandon(state)

    def restart_hash(self, state: BlobState) -> RunState | None:
        """The running SHA-256 at the beginning; queued for the index."""
        state.resumed = 0
        savable = SAVABLE and state.blob.git_sha1 is None
        run = RunState(0, RunningSha256(None, 0).state()) if savable else None
        if run:
            self._committer.progressed(state.id, run)
        return run

    async def _punch(self, owed: Owed) -> bool:
        """Take dropped chunks out of index and file, and let them be fetched. False if the index cannot be written."""
        state = owed.state
        try:
            required, freed, file = await trio.to_thread.run_sync(self._punch_in_thread, owed)
        except CacheError as error:
            if self._pinned(state):
                self._disk_failed(error)
                log.error(
                    "cannot drop %d chunks of %s: %s", len(owed.chunks), state.ref, error,
                    extra=about(ref=state.ref, blob=state.id),
                )  # fmt: skip
                self._fetcher.feed(plan.Undone(state.id, 0, failure_of(error)))
                return False
            return True
        if self._pinned(state):
            state.required |= required
            self._punched(owed, freed, file)
            if state.filling:
                self._fetcher.feed(plan.Fill(state.id, on=True))
        return True

    def _punched(self, owed: Owed, freed: int | None, file: tuple[int, int] | None) -> None:
        state, chunks = owed.state, owed.chunks
        owed.freed = freed or 0
        if owed.way is Way.WHOLE:
            state.whole, state.file, state.prepared = False, file, True
            self.new_life(state)
            chunks = list(state.shape.chunks)  # what was dropped before, and kept its room, is gone too
        elif owed.way is Way.PART:
            state.whole = state.whole or freed is None
        before = self._planner.holding(state.id)
        self._fetcher.feed(plan.Punched(state.id, chunks, freed=freed is not None))
        owed.room = before - self._planner.holding(state.id)

    async def _punch_later(self, owed: Owed) -> None:
        """Until it is done, the chunks are holes that nobody fills: index and file still have them."""
        while self._pinned(owed.state):
            await trio.sleep(RETRY_SECONDS)
            if await self._punch(owed):
                return

    def _punch_in_thread(self, owed: Owed) -> tuple[dict[int, bytes], int | None, tuple[int, int] | None]:
        """What must land there from now on, the bytes that were freed (None: their room is kept), the file."""
        shape, blob, freed = owed.state.shape, owed.state.id, None
        match owed.way:
            case Way.WHOLE:
                freed = self._cache.evict(blob)
                self._cache.prepare(blob)
            case Way.PART:
                freed = self._cache.evict(blob, owed.chunks)
            case Way.LOST:
                self._cache.drop(blob, shape.chunks, punch=False)
            case Way.KEEP:
                # Bytes stay until better ones are written over them: a file that was complete once may be mapped by
                # somebody through the kernel (also by one who outlived a killed daemon), who must see no holes.
                self._cache.drop(blob, ChunkSet(shape.chunk_count, owed.chunks), punch=False)
                if len(owed.chunks) == shape.chunk_count:
                    # With its last chunk the store forgot the file, which is in use all the same.
                    self._cache.prepare(blob)
        required: dict[int, bytes] = {}
        if owed.state.blob.chunk_list is None:
            for run in ChunkSet(shape.chunk_count, owed.chunks).runs():
                required |= self._cache.required_digests(blob, run)
        return required, freed, self._cache.file_identity(blob)

    def _distrust(self, state: BlobState, first: int) -> None:
        trusted = state.blob.chunk_list is not None and state.blob.chunk_list.trusted
        if trusted or first >= state.frontier or state.trust is Trust.QUARANTINED:
            return
        state.trust = state.blob.initial_trust
        self._committer.judged(state.id, state.trust)
        state.run = self.restart_hash(state)

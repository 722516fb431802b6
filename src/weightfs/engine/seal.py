"""Sealing: the in-order hash of the whole that turns a provisional or attested blob into a verified one.

Rules: only durable chunks are fed, so a saved state is never ahead of the records. The bytes are read back from the
disk, so a match proves what is on the disk. The first pass feeds them without looking at their records, for that would
hash every byte twice; if the whole then differs, a second pass compares each chunk with its record before it is fed.
What differs there is the disk's fault, and costs that chunk; if all are equal and the whole still differs, the origin
is at fault, and the blob is quarantined.

The hash is SHA-256, whose state is saved as it goes; or git's SHA-1 where that is all that an origin publishes, or a
SHA-256 that cannot be saved here: those are begun when the blob is complete, and done in one go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import Trust
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.committer import Committer
from weightfs.engine.hashing import Hasher
from weightfs.engine.holdings import Holdings
from weightfs.engine.running import SAVABLE
from weightfs.errors import CacheError, FailureKind
from weightfs.logs import about
from weightfs.store.cache import RunState

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Sealer:
    """One per engine. `busy` says whether readers wait."""

    def __init__(
        self,
        hasher: Hasher,
        committer: Committer,
        holdings: Holdings,
        busy: Callable[[], bool],
    ) -> None:
        self._hasher = hasher
        self._committer = committer
        self._holdings = holdings
        self._busy = busy
        self._queue: dict[bytes, BlobState] = {}
        self._poked = trio.Event()

    @property
    def idle(self) -> bool:
        """Nothing left to do."""
        return not any(self._span(state) is not None for state in self._queue.values())

    def poke(self, state: BlobState) -> None:
        """More of the blob has become durable."""
        unproven = state.blob.digest and state.trust not in (Trust.VERIFIED, Trust.QUARANTINED)
        if unproven and self._holdings.pinned(state):
            self._queue[state.id.raw] = state
            self._poked.set()

    def forget(self, state: BlobState) -> None:
        """The blob is being removed."""
        if self._queued(state):
            del self._queue[state.id.raw]

    def _queued(self, state: BlobState) -> bool:
        return self._queue.get(state.id.raw) is state

    def _span(self, state: BlobState) -> ChunkSpan | None:
        """What can be fed now, if anything. Readers first: an incomplete blob waits while somebody waits for bytes."""
        count = state.shape.chunk_count
        in_parts = SAVABLE and state.blob.git_sha1 is None
        if not state.durable.full and (self._busy() or not in_parts):
            return None
        start = state.frontier
        stop = state.durable.first_hole(start)
        stop = count if stop is None else stop
        if not in_parts:
            return ChunkSpan(0, count)
        return self._hasher.batch(state, start, stop) if stop > start or start == count else None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._poked = trio.Event()
            await trio.lowlevel.checkpoint()  # whatever the queue does, the loop never spins without one
            for state in list(self._queue.values()):
                if not self._queued(state):
                    continue  # removed while another one was hashed
                span = self._span(state)
                if span is None:
                    del self._queue[state.id.raw]  # the next commit brings it back
                    continue
                try:
                    await self._advance(state, span)
                except CacheError as error:
                    await self._failed(state, error)
                else:
                    state.seal_error = None
            if not self._queue:
                await self._poked.wait()

    async def _failed(self, state: BlobState, error: CacheError) -> None:
        log.error("%s", error, extra=about(ref=state.ref, blob=state.id))
        self._holdings.disk_failed(error)
        state.seal_error = error
        state.notify()
        await trio.sleep(RETRY_SECONDS)

    async def _prepare(self, state: BlobState) -> bool:
        if await self._holdings.prepare(state):
            return True
        if self._holdings.pinned(state):
            await trio.sleep(RETRY_SECONDS)  # its log line says why
        else:
            self.forget(state)
        return False

    async def _advance(self, state: BlobState, span: ChunkSpan) -> None:
        if not await self._prepare(state):
            return
        generation = state.generation
        if self._span(state) != span:
            return  # the file was lost, and with it what was to be hashed
        life = state.life
        try:
            answer = await self._hasher.hash(state, span, running=True, compare=state.doubted)
        except CacheError:
            if await self._holdings.mend(state, life):
                return
            raise
        if state.generation != generation or not self._queued(state):
            return  # chunks were taken away meanwhile: what was fed may not be what is there
        if state.doubted:
            self._holdings.cleared(state, range(span.start, answer.stop))
        if answer.state and answer.stop > state.frontier:
            state.run = RunState(answer.stop, bytes.fromhex(answer.state))
            self._committer.progressed(state.id, state.run)
        if answer.bad:
            log.warning(
                "chunk %d of %s: the disk returned other bytes than were received; fetching it again "
                "(fault of the disk)",
                answer.bad[0],
                state.ref,
                extra=about(ref=state.ref, blob=state.id, chunk=answer.bad[0]),
            )
            await self._holdings.drop_bad(state, answer.bad)
        elif answer.stop == state.shape.chunk_count:
            self._judge(state, answer)

    def _judge(self, state: BlobState, answer: wire.Hashed) -> None:
        digest = state.blob.digest
        kind, _, expected = digest.partition(":")
        if f"{kind}:{answer.total}" == digest:
            state.trust = Trust.VERIFIED
            # What the hash took before this process began may have been lost by the stop since.
            self._holdings.cleared(state, [chunk for chunk in state.suspect if chunk >= state.resumed])
            log.info("%s is verified: %s", state.ref, digest, extra=about(ref=state.ref, blob=state.id))
        elif not state.doubted:
            log.warning(
                "the %s of %s is not the promised one; looking for the chunk that is wrong", kind, state.ref,
                extra=about(ref=state.ref, blob=state.id),
            )  # fmt: skip
            state.doubted = True
            state.run = self._holdings.restart_hash(state)
            return
        else:
            state.trust = Trust.QUARANTINED
            state.refuted += 1
            state.faults.refuted()
            log.error(
                "%s is quarantined: its %s is %s where %s was promised, although every chunk is as it was "
                "received: the origin gave wrong bytes (fault of the origin). `weightfs repair` fetches it again, from "
                "another mirror if there is one",
                state.ref, kind, answer.total, expected,
                extra=about(ref=state.ref, blob=state.id, failure=FailureKind.MISMATCH),
            )  # fmt: skip
        self._committer.judged(state.id, state.trust)
        self._queue.pop(state.id.raw, None)
        state.notify()

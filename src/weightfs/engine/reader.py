"""A read: from the cache at once, or after its chunks landed; each byte exactly, or a ReadError within `read_timeout`.

What the cache cannot take or give back is read past it, into memory (`engine.uncached`).

Rules: no lock across an await. Between the last look at `present` and the use of bytes read in a thread, `generation`
is compared: bytes read across a drop are never used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Protocol

import trio

from weightfs.core import plan
from weightfs.core.geometry import MIB, ByteSpan, ChunkSpan
from weightfs.core.manifest import Trust
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.causes import kind_of
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.settings import EngineSettings
from weightfs.engine.tally import Tally
from weightfs.engine.uncached import Uncached
from weightfs.errors import CacheError, DiskFault, FailureKind, NoDescriptorsError, ReadError
from weightfs.logs import about
from weightfs.store.cache import Cache

log = logging.getLogger(__name__)

DISK_TRIES = 3  # reads of one span that find the disk at fault, before it is read past the cache
# Out of file descriptors: others close theirs in a while. Nothing is wrong with the cache; `read_timeout` bounds it.
SCARCE_SECONDS = 0.2
LET_GO_BYTES = 16 * MIB  # of the cache file, behind a sequential reader, per call


class _Observe(Protocol):
    """Takes note of a read, for read-ahead."""

    def __call__(self, state: BlobState, span: ByteSpan, *, stalled: bool) -> None: ...


class Reader:
    """One per engine; holds nothing but its colleagues."""

    def __init__(
        self,
        cache: Cache,
        planner: Planner,
        fetcher: Fetcher,
        holdings: Holdings,
        uncached: Uncached,
        bypassed: Callable[[], bool],
        *,
        settings: EngineSettings,
        nursery: trio.Nursery,
        tally: Tally,
    ) -> None:
        self._cache = cache
        self._tally = tally
        self._uncached = uncached
        self._bypassed = bypassed
        self._planner = planner
        self._fetcher = fetcher
        self._holdings = holdings
        self._settings = settings
        self._nursery = nursery
        self._disk = trio.CapacityLimiter(settings.disk_threads)

    def reload(self, settings: EngineSettings) -> None:
        """Another `read_timeout`, for reads that begin from now on."""
        self._settings = settings

    async def read(self, state: BlobState, span: ByteSpan) -> bytes:
        """The bytes of `span`, clipped at the end of the blob."""
        return await self._read(state, span, self._observe)

    async def read_unseen(self, state: BlobState, span: ByteSpan) -> bytes:
        """The same for ourselves: no stream is made of it, so that nothing is fetched ahead of it."""
        return await self._read(state, span, _unseen)

    def read_nowait(self, state: BlobState, span: ByteSpan) -> bytes | None:
        """The same as `read`, if nothing has to be waited for; else None, and nothing was done."""
        span = span.clamp(state.shape.size)
        return self._read_nowait(state, span, state.shape.chunks_covering(span), self._observe)

    def _read_nowait(
        self, state: BlobState, span: ByteSpan, chunks: ChunkSpan, observe: _Observe
    ) -> bytes | None:
        if not state.policy.allows(state.trust) or not state.present.covers(chunks):
            return None
        data = None if _suspects(state, chunks) else self._cache.read_nowait(state.id, span)
        if data is not None:
            state.touch(chunks)
            observe(state, span, stalled=False)
        return data

    async def _read(self, state: BlobState, span: ByteSpan, observe: _Observe) -> bytes:
        span = span.clamp(state.shape.size)
        chunks = state.shape.chunks_covering(span)
        data = self._read_nowait(state, span, chunks, observe)
        if data is not None:
            return data
        limit = self._settings.read_timeout or float("inf")
        with self._tally.read_waits.timing(), trio.move_on_after(limit):
            return await self._read_slowly(state, span, chunks, observe)
        text = f"chunk {chunks.start} of {state.ref} did not arrive within {limit:g} s (read-timeout)"
        raise ReadError(text, kind=FailureKind.TIMEOUT, ref=state.ref, chunk=chunks.start)

    async def _read_slowly(
        self, state: BlobState, span: ByteSpan, chunks: ChunkSpan, observe: _Observe
    ) -> bytes:
        faults = 0
        observed = False
        while True:
            try:
                observed = await self._await_chunks(state, span, chunks, observe) or observed
            except _NotKeptError:
                return await self._read_past(state, span, chunks, observe)
            generation = state.generation
            data = self._cache.read_nowait(state.id, span)  # what has just landed is in memory: no thread
            try:
                if data is None:
                    data = await trio.to_thread.run_sync(self._cache.read, state.id, span, limiter=self._disk)
            except CacheError as error:
                self._check_pinned(state, chunks)
                if isinstance(error, NoDescriptorsError):
                    await _wait_for_descriptors(error)
                    continue
                faults += 1
                if faults >= DISK_TRIES or not isinstance(error, DiskFault):
                    self._uncached.refused(state, str(error))
                    return await self._read_past(state, span, chunks, observe)
                await self._lose(state, list(chunks), error)
                continue
            if state.generation == generation:
                state.touch(chunks)
                if not observed:
                    observe(state, span, stalled=False)
                return data

    async def _await_chunks(
        self, state: BlobState, span: ByteSpan, chunks: ChunkSpan, observe: _Observe
    ) -> bool:
        """Until all of `chunks` may be given out; whether they had to be fetched, which read-ahead then knows."""
        fetched = False
        while True:
            self._check_pinned(state, chunks)
            await self._await_trust(state)
            if not state.present.covers(chunks):
                if self._goes_past(state):
                    raise _NotKeptError
                await self._prepare(state)
                if not fetched:  # before the wait: what comes next is fetched beside what is waited for
                    observe(state, span, stalled=True)
                    fetched = True
                await self._fetch(state, chunks)
            elif _suspects(state, chunks):
                await self._recheck(state, chunks)
            else:
                return fetched

    def _check_pinned(self, state: BlobState, chunks: ChunkSpan) -> None:
        if not self._holdings.pinned(state):
            raise ReadError(
                f"{state.ref} was removed", kind=FailureKind.CANCELLED, ref=state.ref, chunk=chunks.start
            )

    async def _prepare(self, state: BlobState) -> None:
        try:
            while True:
                try:
                    await self._holdings.prepare(state)
                except NoDescriptorsError as error:
                    await _wait_for_descriptors(error)
                else:
                    return
        except CacheError as error:
            self._holdings.disk_failed(error)
            self._uncached.refused(state, f"cannot keep {state.ref}: {error}")
            raise _NotKeptError from error

    async def _fetch(self, state: BlobState, chunks: ChunkSpan) -> None:
        """Until `chunks` are in the cache. ReadError; _NotKeptError if it is the cache that cannot take them."""
        try:
            await self._fetcher.wait_for(state, chunks)
        except ReadError as error:
            if error.kind not in (FailureKind.DISK, FailureKind.NO_SPACE):
                raise
            self._uncached.refused(state, str(error))
            raise _NotKeptError from error

    async def _lose(self, state: BlobState, chunks: list[int], error: CacheError) -> None:
        """The disk did not give back what was there."""
        self._holdings.disk_failed(error)
        log.warning(
            "%s; fetching the chunks again", error,
            extra=about(ref=state.ref, blob=state.id, chunk=chunks[0]),
        )  # fmt: skip
        await self._holdings.drop_bad(state, chunks)

    # ---- past the cache

    def _goes_past(self, state: BlobState) -> bool:
        return self._bypassed() or self._uncached.serves(state)

    async def _read_past(
        self, state: BlobState, span: ByteSpan, chunks: ChunkSpan, observe: _Observe
    ) -> bytes:
        """Chunk by chunk: from the cache what it has and can give, the rest from the network by way of memory."""
        self._check_pinned(state, chunks)
        missing = [chunk for chunk in chunks if chunk not in state.present]
        observe(state, span, stalled=not all(self._uncached.has(state, chunk) for chunk in missing))
        if len(missing) > 1:  # side by side, though they are waited for one by one
            self._uncached.want(state, chunks)
        parts = []
        for chunk in chunks:
            whole = state.shape.span_of(chunk)
            part = ByteSpan(max(whole.start, span.start), min(whole.stop, span.stop))
            self._check_pinned(state, chunks)
            await self._await_trust(state)
            data = await self._from_cache(state, chunk, part)
            if data is None:
                self._check_pinned(state, chunks)
                data = await self._uncached.read(state, chunk, part)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _from_cache(self, state: BlobState, chunk: int, span: ByteSpan) -> bytes | None:
        """None if the cache has not the chunk, or cannot give it: that it was lost is known then."""
        await self._recheck(state, ChunkSpan(chunk, chunk + 1))
        generation = state.generation
        if chunk not in state.present:
            return None
        try:
            data = self._cache.read_nowait(state.id, span)
            if data is None:
                data = await trio.to_thread.run_sync(self._cache.read, state.id, span, limiter=self._disk)
        except CacheError as error:
            self._check_pinned(state, ChunkSpan(chunk, chunk + 1))
            if isinstance(error, DiskFault):
                await self._lose(state, [chunk], error)
            return None
        return data if state.generation == generation else None

    async def _await_trust(self, state: BlobState) -> None:
        """What the policy demands of the whole blob, before a byte of it is given out."""
        while not state.policy.allows(state.trust):
            if state.trust is Trust.QUARANTINED:
                text = f"{state.ref} is quarantined (its digest is not the promised one): use another mirror"
                raise ReadError(text, kind=FailureKind.MISMATCH, ref=state.ref)
            if not state.blob.digest:
                text = f"{state.ref} has no digest to be verified with, and policy {state.policy} demands one"
                raise ReadError(text, kind=FailureKind.MISMATCH, ref=state.ref)
            if self._fetcher.closed:
                raise ReadError(self._fetcher.closed.text, kind=FailureKind.CANCELLED, ref=state.ref)
            changed = state.changed
            if self._bypassed():
                text = (
                    f"cannot prove {state.ref}: the disk of the cache fails, so it cannot be had as a whole"
                )
                raise ReadError(text, kind=FailureKind.DISK, ref=state.ref)
            try:
                await self._holdings.fill(state)
            except CacheError as error:
                self._holdings.disk_failed(error)
                text = f"cannot read {state.ref}: {error}"
                raise ReadError(text, kind=kind_of(error), ref=state.ref) from error
            self._check_pinned(state, state.shape.chunks)
            if full := state.no_room:
                raise ReadError(f"cannot read {state.ref}: {full}", kind=FailureKind.NO_SPACE, ref=state.ref)
            if unproven := state.seal_error:
                text = f"cannot prove {state.ref}: {unproven}"
                raise ReadError(text, kind=kind_of(unproven), ref=state.ref)
            if failure := self._planner.stuck(state.id):
                raise ReadError(
                    f"{state.ref}: {failure.text}", kind=failure.kind, ref=state.ref, mirror=failure.mirror
                )
            await changed.wait()

    def _observe(self, state: BlobState, span: ByteSpan, *, stalled: bool) -> None:
        window = state.readahead.observe(span, stalled)
        if not self._holdings.pinned(state):
            return  # removed while its bytes came: nothing is fetched for it any more
        if window is not None and not state.complete and not state.present.covers(window):
            if self._goes_past(state):
                self._uncached.want(state, window)
            else:
                self._fetcher.feed(plan.Want(state.id, window))
        if state.sealed:
            self._let_go(state, span)

    def _let_go(self, state: BlobState, span: ByteSpan) -> None:
        """The mount's page cache has these bytes now: keep them in memory once, not twice."""
        if span.start < state.let_go:
            state.let_go = span.start
        elif span.start - state.let_go >= 2 * LET_GO_BYTES:
            behind = ByteSpan(max(state.let_go, span.start - 2 * LET_GO_BYTES), span.start - LET_GO_BYTES)
            state.let_go = behind.stop
            self._nursery.start_soon(trio.to_thread.run_sync, self._cache.forget_pages, state.id, behind)

    async def _recheck(self, state: BlobState, chunks: ChunkSpan) -> None:
        """Hash chunks that were recorded before an unclean stop; what fails is a hole again. Once for all readers."""
        for chunk in chunks:
            running = state.checking.get(chunk)
            if running is not None:
                await running.wait()
            elif chunk in state.suspect:
                done = state.checking[chunk] = trio.Event()
                try:
                    await self._recheck_one(state, chunk)
                finally:
                    del state.checking[chunk]
                    done.set()

    async def _recheck_one(self, state: BlobState, chunk: int) -> None:
        while True:
            try:
                good = await trio.to_thread.run_sync(self._equals_record, state, chunk, limiter=self._disk)
                break
            except NoDescriptorsError as error:  # nobody could look at it, which says nothing of it
                await _wait_for_descriptors(error)
        if chunk not in state.suspect:
            return  # dropped or cleared by somebody else meanwhile
        if good:
            self._holdings.cleared(state, [chunk])
        else:
            log.warning(
                "chunk %d of %s did not survive the last stop; fetching it again (fault of the disk)",
                chunk, state.ref, extra=about(ref=state.ref, blob=state.id, chunk=chunk),
            )  # fmt: skip
            await self._holdings.drop_bad(state, [chunk])

    def _equals_record(self, state: BlobState, chunk: int) -> bool:
        """NoDescriptorsError."""
        try:
            record = self._cache.digests(state.id, ChunkSpan(chunk, chunk + 1)).get(chunk)
            data = self._cache.read(state.id, state.shape.span_of(chunk))
        except NoDescriptorsError:
            raise
        except CacheError:
            return False
        return hashlib.sha256(data).digest() == record


class _NotKeptError(Exception):
    """The cache has no place for what is wanted: between this module's functions only."""


def _unseen(state: BlobState, span: ByteSpan, *, stalled: bool) -> None:
    """In the place of `Reader._observe`."""


async def _wait_for_descriptors(error: CacheError) -> None:
    log.warning("%s; trying again", error)
    await trio.sleep(SCARCE_SECONDS)


def _suspects(state: BlobState, chunks: ChunkSpan) -> bool:
    return len(state.suspect) > 0 and any(chunk in state.suspect for chunk in chunks)

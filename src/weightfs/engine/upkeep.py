"""What people ask of whole refs: wait until complete (`pull`), compare what is cached with the records (`verify`)."""

from __future__ import annotations

from collections.abc import Callable

import trio

from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import Trust
from weightfs.core.plan import Failure
from weightfs.core.planner import Planner
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.causes import one_cause
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.hashing import Hasher
from weightfs.engine.health import DiskWatch
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.seal import Sealer
from weightfs.engine.status import VerifyProgress, VerifyReport
from weightfs.errors import (
    CacheError,
    DiskFault,
    FailureKind,
    IntegrityError,
    NoSpaceError,
    ReadError,
    WeightfsError,
)

# Files of one ref that are completed side by side: a repository has hundreds of small ones, a round trip each. The
# planner begins with the first all the same, and bounds what is in flight.
COMPLETE_AT_ONCE = 16


class Upkeep:
    """One per engine; holds nothing but its colleagues."""

    def __init__(
        self,
        catalog: Catalog,
        planner: Planner,
        fetcher: Fetcher,
        holdings: Holdings,
        hasher: Hasher,
        sealer: Sealer,
        keeper: Keeper,
        watch: DiskWatch,
    ) -> None:
        self._watch = watch
        self._catalog = catalog
        self._planner = planner
        self._fetcher = fetcher
        self._holdings = holdings
        self._hasher = hasher
        self._sealer = sealer
        self._keeper = keeper

    async def complete(self, ref: str) -> None:
        """Fetch all of a ref and wait until it is sealed.

        KeyError if the ref is not pinned; ReadError if something cannot be had; IntegrityError if the whole is wrong;
        NoSpaceError, DiskFault or CacheError if the cache cannot keep it.
        """
        files = {state.id: (path, state) for path, state in self._catalog.files(ref)}
        left = iter(files.values())
        # All of them from the beginning: none is to be evicted to make room for another.
        for _, state in files.values():
            state.completing += 1
            state.no_room = None
            self._keeper.weigh(state)  # a pause does not hold back what somebody waits for

        async def work() -> None:
            for path, state in left:
                await self.complete_file(path, state)

        try:
            async with one_cause(CacheError, IntegrityError, WeightfsError), trio.open_nursery() as nursery:
                for _ in range(min(COMPLETE_AT_ONCE, len(files))):
                    nursery.start_soon(work)
        finally:
            for _, state in files.values():
                state.completing -= 1
                self._keeper.weigh(state)
                self._keeper.rest(state)  # what could not be completed is not fetched for nobody

    async def complete_file(self, path: str, state: BlobState) -> None:
        """One file, as `complete`; that it is being completed is counted by the caller."""
        while not state.sealed or len(state.suspect):
            await self._seal(path, state)
            # What was recorded before an unclean stop is hashed once more: the whole was proven, the disk was not.
            for run in list(state.suspect.runs()):
                span = self._hasher.batch(state, run.start, run.stop)
                if found := await self._verify_span(state, span):
                    await self._holdings.drop_bad(state, found)
                    await self._fetch(state, found)

    async def _seal(self, path: str, state: BlobState) -> None:
        while not state.sealed:
            changed, gave_up = state.changed, state.gave_up
            if not self._holdings.pinned(state):
                raise ReadError(
                    f"{state.ref} was removed meanwhile", kind=FailureKind.CANCELLED, ref=state.ref
                )
            if self._watch.bypassed:
                raise DiskFault(f"{path} of {state.ref} cannot be completed: {self._watch.trouble}")
            await self._holdings.fill(state)
            self._sealer.poke(state)
            if full := state.no_room:
                raise NoSpaceError(f"{path} of {state.ref} cannot be completed: {full}")
            if error := state.seal_error:
                state.seal_error = None
                raise error
            if state.trust is Trust.QUARANTINED:
                raise IntegrityError(
                    f"{path} of {state.ref} is quarantined: its digest is not the promised one, although every chunk "
                    "is as it was received; `weightfs repair` fetches it again, from another mirror if there is one"
                )
            if failure := self._planner.stuck(state.id):
                raise _cannot_complete(path, state, failure)
            if not self._holdings.pinned(state):
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_first_of, changed, nursery.cancel_scope)
                nursery.start_soon(_first_of, gave_up, nursery.cancel_scope)
            if gave_up.is_set() and state.gave_up is gave_up:
                state.gave_up = trio.Event()

    async def verify(
        self, ref: str, *, repair: bool, on_progress: Callable[[VerifyProgress], None] = lambda _: None
    ) -> VerifyReport:
        """Hash everything cached of a ref; drop what differs from its record and, with `repair`, fetch it again.

        KeyError if the ref is not pinned; CacheError if the records cannot be read; ReadError if a repair fails.
        """
        files = self._catalog.files(ref)
        total = sum(state.present_bytes for _, state in files)
        chunks = done = repaired = 0
        bad: list[tuple[str, int]] = []
        for path, state in files:
            lost = await self._look_at_file(state)
            bad += [(path, chunk) for chunk in lost]
            if lost and repair:
                repaired += await self._fetch(state, lost)
            for run in list(state.durable.runs()):
                start = run.start
                while start < run.stop:
                    span = self._hasher.batch(state, start, run.stop)
                    found = await self._verify_span(state, span)
                    bad += [(path, chunk) for chunk in found]
                    if found:
                        state.refuted += 1  # somebody may have read it, and the kernel keep that
                        await self._holdings.drop_bad(state, found)
                        repaired += await self._fetch(state, found) if repair else 0
                    chunks += len(span)
                    done += len(state.shape.bytes_of(span))
                    start = span.stop
                    on_progress(VerifyProgress(ref, done, total))
        quarantined = tuple(path for path, state in files if state.trust is Trust.QUARANTINED)
        return VerifyReport(chunks, done, tuple(bad), repaired, quarantined)

    async def _look_at_file(self, state: BlobState) -> list[int]:
        """The chunks that were cached in a file that is gone, cut or replaced by another: they are holes now."""
        if not len(state.present):
            return []
        cached, life = list(state.present), state.life
        state.prepared = False
        await self._holdings.prepare(state)
        return cached if state.life != life else []

    async def _verify_span(self, state: BlobState, span: ChunkSpan) -> list[int]:
        answer = await self._hasher.hash(state, span)
        found = [chunk for chunk in answer.bad if chunk in state.durable]  # not what was dropped meanwhile
        self._holdings.cleared(
            state, [chunk for chunk in span if chunk not in found and chunk in state.durable]
        )
        return found

    async def _fetch(self, state: BlobState, chunks: list[int]) -> int:
        await self._holdings.prepare(state)
        for chunk in chunks:
            await self._fetcher.wait_for(state, ChunkSpan(chunk, chunk + 1))
        return len(chunks)


def _cannot_complete(path: str, state: BlobState, failure: Failure) -> WeightfsError:
    text = f"{path} of {state.ref} cannot be completed: {failure.text}"
    match failure.kind:
        case FailureKind.NO_SPACE:
            return NoSpaceError(text)
        case FailureKind.DISK:
            return DiskFault(text, blob=str(state.id))
        case kind:
            return ReadError(text, kind=kind, ref=state.ref, chunk=failure.chunk, mirror=failure.mirror)


async def _first_of(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()

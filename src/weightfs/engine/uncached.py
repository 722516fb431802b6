"""What the cache cannot keep, for readers who wait for it: fetched into memory, given out, and soon forgotten.

The disk is full and nobody can go, or it is sick (`engine.health`). Then a chunk is fetched by the same rules as any
other (mirrors, retries, chunk list, one fetch for all its readers), by a planner of its own whose chunks land in
memory.

Rules:

- Nothing of it is recorded, and nothing that is here counts as present: `BlobState.present` is the cache's.
- At most `MEMORY_BYTES` are held or on their way, for all blobs together; a single chunk that is larger is refused.
- A reader asks for one chunk at a time, and copies it in the same step in which it finds it here: so a reader never
  holds memory while it waits for more of it, and however many there are, each gets its turn.
- Chunks stay while there is room, the least recently read go first: the kernel asks for a chunk in pieces, and a
  sequential reader for the next one. What nobody has read for `IDLE_SECONDS` goes by itself.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import trio

from weightfs.core import plan
from weightfs.core.bandwidth import Pacer
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MIB, ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.core.plan import Failure, Limits
from weightfs.core.planner import Planner
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.fetcher import Fetcher, Place
from weightfs.engine.tally import Tally
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind, ReadError
from weightfs.store.memory import MemoryFile
from weightfs.units import format_size

log = logging.getLogger(__name__)

# A stream of its own for each of eight loaders with a window of 8 MiB, which hides the way to an origin; and no more
# than one stream's read-ahead takes of memory anyhow.
MEMORY_BYTES: Final = 64 * MIB
BACKGROUND_PART: Final = 4  # read-ahead leaves one part in so many to who waits
WINDOW_PART: Final = 8  # of the whole, for one stream's read-ahead
IDLE_SECONDS: Final = 30.0
SWEEP_SECONDS: Final = 10.0
# After a refusal readers go past the cache at once for so long; then the cache is asked again. As `Limits.hold_base`.
REFUSAL_SECONDS: Final = 5.0
_NOT_KEPT: Final = "what readers want and it cannot take is read from the network and not kept"
FIRST_JOB: Final = 1 << 40  # job numbers tell whose a job is: the other planner's never come so far


class Uncached:
    """One per engine."""

    def __init__(
        self,
        limits: Limits,
        pool: WorkerPool,
        memory: MemoryFile,
        pacer: Pacer,
        tally: Tally,
        nursery: trio.Nursery,
    ) -> None:
        self._limit = MEMORY_BYTES
        self._memory = memory
        # What lands here is never durable: the bounds of that do not hold, and memory is the bound.
        boundless = replace(limits, unsettled_bytes=1 << 62, background_unsettled_bytes=1 << 62)
        self.planner = Planner(boundless, first_job=FIRST_JOB)
        # One pacer for both fetchers: there is one line.
        self.fetcher = Fetcher(
            self.planner, pool, self._landed, _not_lost, nursery, pacer, tally, self._place
        )
        self.fetcher.connect(self._need_room, _no_relief, _not_the_disk)
        self.fetcher.feed(plan.Capacity(self._limit, self._limit - self._limit // BACKGROUND_PART))
        self._known: dict[BlobId, BlobState] = {}
        self._held: OrderedDict[tuple[BlobId, int], float] = OrderedDict()  # when last read, the oldest first
        self._awaited: Counter[tuple[BlobId, int]] = Counter()
        self._lives: Counter[BlobId] = Counter()  # what began in an earlier one does not land
        self._until: dict[BlobId, float] = {}
        self._why = ""
        self._poked = trio.Event()
        self._said = False

    # ---- when

    def refused(self, state: BlobState, text: str) -> None:
        """The cache has no place for what is wanted of a blob: for a while its readers need not ask."""
        self._until[state.id] = trio.current_time() + REFUSAL_SECONDS
        self._why = text
        self._poked.set()
        if not self._said:
            self._said = True
            log.warning("%s; %s", text, _NOT_KEPT)

    def serves(self, state: BlobState) -> bool:
        """Whether the cache has refused the blob lately."""
        return self._until.get(state.id, float("-inf")) > trio.current_time()

    def trouble(self, known: str) -> str:
        """What is `known` to be wrong with the cache and, if it has refused anything lately, what readers get then."""
        return f"{known or self._why}; {_NOT_KEPT}" if self._busy else known

    @property
    def _busy(self) -> bool:
        return any(until > trio.current_time() for until in self._until.values())

    # ---- reading

    async def read(self, state: BlobState, chunk: int, span: ByteSpan) -> bytes:
        """`span`, which lies in the chunk. ReadError if it cannot be had."""
        key = (state.id, chunk)
        present = self._present(state)
        self._awaited[key] += 1
        try:
            while True:
                if self._known.get(state.id) is not state:
                    raise ReadError(
                        f"{state.ref} was removed", kind=FailureKind.CANCELLED, ref=state.ref, chunk=chunk
                    )
                if chunk in present:
                    self._touch(key)
                    return self._memory.read(state.id, span)
                await self.fetcher.wait_for(state, ChunkSpan(chunk, chunk + 1))
        finally:
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]
                self._poked.set()  # it may go now

    def has(self, state: BlobState, chunk: int) -> bool:
        """Whether the chunk is here."""
        return state.id in self._known and chunk in self._present(state)

    def want(self, state: BlobState, window: ChunkSpan) -> None:
        """Read-ahead: what of the window neither the cache nor memory has."""
        self._present(state)
        most = max(1, self._limit // WINDOW_PART // state.shape.chunk_length)
        for hole in state.present.holes(ChunkSpan(window.start, min(window.stop, window.start + most))):
            self.fetcher.feed(plan.Want(state.id, hole))

    def _present(self, state: BlobState) -> ChunkSet:
        if self._known.get(state.id) is not state:
            self._known[state.id] = state
            self.fetcher.add(state, ChunkSet(state.shape.chunk_count))
        return self.planner.present(state.id)

    def _place(self, state: BlobState) -> Place:
        return Place("", None, self._lives[state.id], self._memory.base(state.id, state.shape))

    def _landed(self, state: BlobState, chunk: int, _digest: bytes, _mirror: int) -> None:
        self._touch((state.id, chunk))
        self._poked.set()  # there may be somebody who can go now

    def _touch(self, key: tuple[BlobId, int]) -> None:
        self._held[key] = trio.current_time()
        self._held.move_to_end(key)

    # ---- life of a blob

    def changed(self, state: BlobState) -> None:
        """Its mirrors or its chunk list have changed: what is here was judged by older ones."""
        if self._known.get(state.id) is state:
            self._lives[state.id] += 1
            self.fetcher.abandon(state)
            self.fetcher.feed(plan.Remirrored(state.id, state.mirrors))
            self._drop(state, [chunk for blob, chunk in self._held if blob == state.id])

    def refuted(self, state: BlobState, sources: Mapping[int, int]) -> None:
        """As `plan.Refuted`; what is here may be of the same mirrors, and nothing of it can be proven."""
        self._present(state)  # it may be read past the cache only from now on, and must know then
        self.changed(state)
        self.fetcher.feed(plan.Refuted(state.id, sources))

    async def remove(self, state: BlobState) -> None:
        """The blob is being removed: returns when nothing of it is here or on its way."""
        self._until.pop(state.id, None)
        if self._known.get(state.id) is not state:
            return
        self._drop(state, [chunk for blob, chunk in self._held if blob == state.id])
        del self._known[state.id]
        self.fetcher.remove(state.id)
        await self.fetcher.drained(state)
        self._memory.forget(state.id)
        self._lives.pop(state.id, None)

    # ---- room

    def _need_room(self) -> None:
        self._poked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(SWEEP_SECONDS if self._held or self._said else float("inf")):
                await self._poked.wait()
            self._poked = trio.Event()
            now = trio.current_time()
            self._make_room()
            old = [key for key, used in self._held.items() if used + IDLE_SECONDS <= now]
            self._let_go([key for key in old if key not in self._awaited])
            if self._said and not self._busy and not self._held:
                self._said = False  # when it begins again, that is news

    def _make_room(self) -> None:
        short = self.planner.short()
        if not short:
            return
        most = self._limit
        if plan.Priority.DEMAND not in short.values():
            most -= self._limit // BACKGROUND_PART
        lacking = max(self.planner.lacking_bytes(blob) for blob in short)
        over = self.planner.held_bytes + lacking - most
        going: list[tuple[BlobId, int]] = []
        for key in self._held:
            if over <= 0:
                break
            if key not in self._awaited:
                going.append(key)
                over -= len(self._known[key[0]].shape.span_of(key[1]))
        if lacking > self._limit:
            text = (
                f"{format_size(lacking)} would have to be in memory at once, and at most {format_size(self._limit)} "
                "may: make room in the cache, or mend its disk"
            )
            self.fetcher.feed(plan.NoRoom(Failure(FailureKind.NO_SPACE, text)))
        else:
            self._let_go(going)

    def _let_go(self, keys: list[tuple[BlobId, int]]) -> None:
        by_blob: dict[BlobId, list[int]] = {}
        for blob, chunk in keys:
            by_blob.setdefault(blob, []).append(chunk)
        for blob, chunks in by_blob.items():
            self._drop(self._known[blob], chunks)

    def _drop(self, state: BlobState, chunks: list[int]) -> None:
        self.fetcher.feed(plan.Dropped(state.id, chunks))
        for chunk in chunks:
            del self._held[state.id, chunk]
            self._memory.free(state.id, state.shape, chunk)
        self.fetcher.feed(plan.Punched(state.id, chunks, freed=True))

    # ---- looking at it

    def handle(self, message: wire.FromWorker) -> bool:
        """What a worker said, if it is about a job of ours. Whether it was."""
        if getattr(message, "job", 0) < FIRST_JOB:
            return False
        self.fetcher.handle(message)
        return True

    def check(self) -> list[str]:
        """Sentences about anything that should not be; empty if all is well and nothing is in flight."""
        problems = self.planner.check()
        if not self.planner.idle():
            problems.append(f"{self.fetcher.jobs} fetches into memory in flight")
        if self.fetcher.paced > self.fetcher.jobs:
            problems.append(
                f"{self.fetcher.paced - self.fetcher.jobs} fetches into memory are paced and have ended"
            )
        if self._awaited:
            problems.append(f"{len(self._awaited)} chunks in memory are awaited by nobody")
        held = {(blob, chunk) for blob in self._known for chunk in self.planner.present(blob)}
        if held != set(self._held):
            problems.append("what is in memory is not what it is said to be")
        if self.planner.held_bytes > self._limit:
            problems.append(f"{self.planner.held_bytes} bytes are held in memory")
        return problems


async def _not_lost(_state: BlobState, _life: int) -> bool:
    return False


async def _no_relief(_state: BlobState, _job: int) -> bool:
    return False


def _not_the_disk(_error: Exception) -> None:
    """Memory is no disk."""

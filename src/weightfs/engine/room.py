"""Room in the cache: its limits, and who has to go when something does not fit (docs/design.md, "Eviction").

Rules:

- The planner reserves: what is present, in flight or kept never exceeds the capacity that is told to it here, so
  that the limits hold without anybody being evicted. Evicting is what lets it go on.
- Readers' demand has somebody evicted, and so has the background of what is open, pinned or pulled. Fill that nobody
  asked for (mode `all`) never has: it pauses. Else two models that do not fit both would evict one another for ever.
- Who goes is `core.eviction`'s word, never: pinned blobs, open ones, those of a `pull`, those with a fetch in flight.
  So a blob never has its own head evicted to fetch its tail.
- One eviction at a time, a batch at once. If nobody can go, readers of what does not fit are told, and the rest waits
  until something changes; it is looked at again every few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial

import trio

from weightfs.core import plan
from weightfs.core.eviction import Candidate, Eviction, EvictionPlan, plan_evictions
from weightfs.core.geometry import GIB, MIB
from weightfs.core.manifest import BlobId
from weightfs.core.plan import Failure, Priority
from weightfs.core.planner import Planner
from weightfs.engine import blobs
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.holdings import Holdings
from weightfs.engine.settings import EngineSettings
from weightfs.engine.status import CacheSpace, EvictedStatus, GcReport
from weightfs.engine.turns import in_turns
from weightfs.errors import CacheError, FailureKind, NoSpaceError
from weightfs.store.cache import Cache
from weightfs.units import format_duration, format_size

log = logging.getLogger(__name__)

SPACE_SECONDS = 5.0  # how old the word on the filesystem's space may be
FRESH_SECONDS = 1.0  # how old it may be where a reader is refused for it
AGE_SECONDS = 60.0  # how often somebody is looked for who is too old
USE_SECONDS = 60.0  # how often last uses are recorded: a kill costs no more than that
# Room that background leaves to demand, and what is evicted at once beyond what is wanted: an eviction is then needed
# once in so many bytes, not for every chunk. Both are cut for a small cache.
MARGIN, MARGIN_PART = 64 * MIB, 32
BATCH, BATCH_PART = 256 * MIB, 8
# Enough for logs, the index and whoever else writes there to get along, and no disk is so small that it hurts.
MIN_FREE, MIN_FREE_PART = GIB, 100


def default_min_free(total: int) -> int:
    """What a filesystem of `total` bytes keeps free unless configured: 1 %, at most 1 GiB."""
    return min(MIN_FREE, total // MIN_FREE_PART)


class Room:
    """One per engine. Owned by the trio thread."""

    def __init__(
        self,
        cache: Cache,
        settings: EngineSettings,
        catalog: Catalog,
        planner: Planner,
        fetcher: Fetcher,
        holdings: Holdings,
    ) -> None:
        self._cache = cache
        self._settings = settings
        self._catalog = catalog
        self._planner = planner
        self._fetcher = fetcher
        self._holdings = holdings
        self._poked = trio.Event()
        self._evicting = trio.Lock()  # held across disk work, never across network
        self._relieving = False  # a full disk is what is being evicted for
        self._reliefs = 0  # how often one was given room
        self._measured = self._aged = self._noted = float("-inf")
        self._free_bound: int | None = None  # what may be held, by the filesystem's space
        self._leaving = 0  # bytes of removed blobs whose files are still there
        # Fill that nobody asked for, and for which there is no room.
        self._paused: dict[BlobId, BlobState] = {}
        self._refused_bytes = 0  # what did not fit when `trouble` was said
        self._refused: dict[BlobId, BlobState] = {}  # whose background was told that there is no room
        self.space = CacheSpace(0, 0)
        self.limit: int | None = None
        self.evicted_bytes = 0
        self.trouble = ""

    # ---- life

    def give_back_leftovers(self) -> None:
        """What was written before an unclean stop, and not recorded: nobody counts it. Before anything else; blocks."""
        for state in self._catalog.states():
            if not state.stale or state.whole:
                continue
            absent = [chunk for hole in state.present.holes(state.shape.chunks) for chunk in hole]
            try:
                state.whole = self._cache.evict(state.id, absent) is None
            except CacheError as error:
                log.warning("what is left over in the file of %s keeps its room: %s", state.ref, error)

    def open(self) -> None:
        """The planner knows all blobs, and nothing is fetched yet. Blocks."""
        self._take(self._look_at_space(), self._planner.held_bytes)

    def reload(self, settings: EngineSettings) -> None:
        """Other limits from now on."""
        self._settings = settings
        self._measured = self._aged = float("-inf")
        self.poke()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(SPACE_SECONDS):
                await self._poked.wait()
            self._poked = trio.Event()
            now = trio.current_time()
            if now >= self._measured + SPACE_SECONDS:
                await self._measure()
            if self._settings.tidies:
                await self._tidy(now)
            if now >= self._noted + USE_SECONDS:
                self._noted = now
                await self.note_uses()

    async def _tidy(self, now: float) -> None:
        async with self._evicting:
            if self._settings.max_age is not None and now >= self._aged + AGE_SECONDS:
                self._aged = now
                await self._evict(0)
            await self._serve()

    def poke(self) -> None:
        """Something does not fit, or somebody may go who could not before."""
        self._poked.set()

    async def note_uses(self) -> None:
        """Record last uses that have changed. A cache that cannot be written keeps the old ones."""
        changed = [state for state in self._catalog.states() if state.uses.changed]
        if not changed:
            return
        times = {state.id: tuple(state.uses.times) for state in changed}
        for state in changed:
            state.uses.changed = False
        try:
            await trio.to_thread.run_sync(self._cache.note_uses, times)
        except CacheError as error:
            log.debug("last uses are not recorded: %s", error)
            for state in changed:
                state.uses.changed = True

    @contextlib.contextmanager
    def leaving(self, state: BlobState) -> Iterator[None]:
        """While a removed blob's file is still there, its bytes are nobody else's."""
        nbytes = self._planner.holding(state.id) if self._planner.knows(state.id) else 0
        self._leaving += nbytes
        self._tell_capacity()
        try:
            yield
        finally:
            self._leaving -= nbytes
            self._tell_capacity()

    # ---- limits

    def _look_at_space(self) -> CacheSpace:
        try:
            stats = os.statvfs(self._cache.root)
        except OSError as error:
            log.debug("the space of the cache's filesystem is not known: %s", error.strerror)
            return self.space
        return CacheSpace(stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize)

    async def _measure(self) -> None:
        self._measured = trio.current_time()
        # Before the look: what lands meanwhile is then counted as if it were still to be written.
        settled = self._planner.held_bytes - self._planner.reserved_bytes
        space = await trio.to_thread.run_sync(self._look_at_space)
        self._take(space, settled)
        self._resume()

    def _take(self, space: CacheSpace, settled: int) -> None:
        self.space = space
        keep = self._settings.min_free_bytes
        if keep is None:
            keep = default_min_free(space.total_bytes)
        self._free_bound = settled + space.free_bytes - keep if keep else None
        self._tell_capacity()

    def _tell_capacity(self) -> None:
        bounds = [bound for bound in (self._settings.max_bytes, self._free_bound) if bound is not None]
        self.limit = max(0, min(bounds) - self._leaving) if bounds else None
        background = None if self.limit is None else self.limit - min(MARGIN, self.limit // MARGIN_PART)
        self._fetcher.feed(plan.Capacity(self.limit, background))

    def _batch(self) -> int:
        return 0 if self.limit is None else min(BATCH, self.limit // BATCH_PART)

    # ---- making room

    async def _serve(self) -> None:
        """Evict for as long as something that matters does not fit, and somebody can go."""
        while True:
            over, (wanted, least) = self._over(), self._wanted()
            if not wanted:
                break
            # The second time, what turned out to have been whole in the meantime goes whole.
            if await self._evict(wanted, least) or await self._evict(wanted, least):
                continue
            if trio.current_time() < self._measured + FRESH_SECONDS:
                await self._refuse(lacking=max(0, least - over))
                return
            await self._measure()  # somebody may have made room on the disk meanwhile
        await self._pause()
        await self._relax()

    def _wanted(self) -> tuple[int, int]:
        """Bytes to evict now, and how many of them are needed that anything goes on: with fewer, nobody goes for it."""
        if self.limit is None:
            return 0, 0
        over = self._over()
        if demanded := self._planner.demanded_bytes():
            short = self._planner.short().items()
            demand = [blob for blob, priority in short if priority is Priority.DEMAND]
            least = over + min(map(self._planner.lacking_bytes, demand))
            wanted = over + demanded
        elif background := [state.id for state in self._short_states() if self._asked_for(state)]:
            lacking = max(map(self._planner.lacking_bytes, background))
            least = wanted = over + min(MARGIN, self.limit // MARGIN_PART) + lacking
        else:
            least, wanted = 0, over
        return (wanted + self._batch(), least) if wanted > 0 else (0, 0)

    def _over(self) -> int:
        """By how many bytes the limit is exceeded; negative while it is not. 0 without one."""
        return 0 if self.limit is None else self._planner.held_bytes - self.limit

    def _short_states(self) -> list[BlobState]:
        return [state for blob in self._planner.short() if (state := self._catalog.get(blob))]

    def _asked_for(self, state: BlobState) -> bool:
        return bool(state.handles or state.completing) or self._catalog.is_kept(state.id)

    async def _pause(self) -> None:
        """Fill that nobody asked for makes way to what is behind it in the line."""
        if all(self._asked_for(state) for state in self._short_states()):
            return
        for turn in in_turns(self._catalog.states()):
            for state in turn:
                if state.filling and not state.complete and not self._asked_for(state):
                    self._paused[state.id] = state
                    self._fetcher.feed(plan.Fill(state.id, on=False))
            await trio.lowlevel.checkpoint()
        if self._paused:
            self._say(f"{self._full()}; {len(self._paused)} files are not fetched in the background")

    def _resume(self) -> None:
        """Fill goes on when there is room for a batch, so that it does not stop again at once."""
        if self._paused and self._over() + self._batch() <= 0:
            paused, self._paused = self._paused, {}
            for state in paused.values():
                if state.filling and self._holdings.pinned(state):
                    self._fetcher.feed(plan.Fill(state.id, on=True))

    async def _relax(self) -> None:
        for state in self._refused.values():
            state.no_room = None
        self._refused.clear()
        # Read-ahead of what was closed since may wait for ever, and is nobody's trouble.
        wanted = any(self._asked_for(state) for state in self._short_states())
        if self.trouble and not self._paused and not wanted and await self._could_fit():
            log.info("there is room in the cache again")
            self.trouble = ""

    async def _could_fit(self) -> bool:
        """Whether who was refused would have room now, or have it made. Who waits no longer has still to be told of."""
        missing = self._over() + self._refused_bytes
        return missing <= 0 or (await self._plan(missing)).nbytes >= missing

    async def _refuse(self, lacking: int) -> None:
        """Nobody can go, and `lacking` bytes do not fit: tell who waits."""
        # What is larger than the whole cache would never fit; the others do with a batch.
        self._refused_bytes = lacking if self.limit is None or lacking <= self.limit else self._batch()
        text = f"{self._full()}, and what is in it is pinned or in use; {self._way_out()}"
        self._say(text)
        if Priority.DEMAND in self._planner.short().values():
            self._fetcher.feed(plan.NoRoom(Failure(FailureKind.NO_SPACE, text)))
        if self._planner.short():  # background, which waits; those who wait for it need not
            for turn in in_turns(self._catalog.states()):
                for state in turn:
                    if state.filling and not state.complete:
                        state.no_room = NoSpaceError(text)
                        self._refused[state.id] = state
                        state.notify()
                await trio.lowlevel.checkpoint()
        await self._pause()

    def _by_size(self) -> bool:
        """Whether it is `max-size` that binds, not the space of the filesystem."""
        size = self._settings.max_bytes
        return size is not None and (self._free_bound is None or size <= self._free_bound)

    def _full(self) -> str:
        if self._by_size():
            return (
                f"the cache has reached its limit of {format_size(self._settings.max_bytes or 0)} (max-size)"
            )
        return f"the disk of the cache has {format_size(self.space.free_bytes)} free (min-free)"

    def _way_out(self) -> str:
        if self._by_size():
            return "raise max-size, or unpin, close or remove some models"
        return "free some space, or unpin, close or remove some models"

    def _say(self, text: str) -> None:
        if text != self.trouble and not self.trouble:
            log.warning("%s", text)
        self.trouble = text

    async def relieve(self, state: BlobState, job: int) -> bool:
        """The disk is full, says `job` (0: a commit). Whether there is room now: once, until a commit went well."""
        if self._evicting.statistics().owner is trio.lowlevel.current_task():
            # A commit that an eviction begins with. If that is for the sake of a full disk, there will be room.
            return self._relieving
        if self._fetcher.closed:
            return False  # nothing is fetched again, so that nobody has to go for it
        made = self._reliefs
        async with self._evicting:
            if 0 < job < state.relieved or self._reliefs != made:
                return True  # somebody who failed at the same time had it made already
            if state.relieved:
                return False
            state.relieved = self._planner.next_job
            self._relieving = True
            try:
                # What has landed is not committed before there is somebody to evict: on a full disk that fails.
                freed = await self._evict(max(self._batch(), MARGIN), settle=False)
            finally:
                self._relieving = False
            self._reliefs += freed > 0
            return freed > 0

    # ---- evicting

    async def gc(self, *, dry_run: bool) -> GcReport:
        """Evict what is too old, and what is beyond the limits; or only say what."""
        await self._measure()
        async with self._evicting:
            await self._holdings.settle()
            found = await self._plan(max(0, self._over()))
            before = self.evicted_bytes
            told = [self._describe(eviction) for eviction in found.evictions]
            if not dry_run:
                carried_out = await self._carry_out(found)
                told = [one for one, freed in zip(told, carried_out, strict=True) if freed]
            freed = found.nbytes if dry_run else self.evicted_bytes - before
        done = tuple(one for one in told if one is not None)
        return GcReport(dry_run, done, freed, found.missing, self._planner.held_bytes, self.limit)

    async def _evict(self, wanted: int, least: int = 0, *, settle: bool = True) -> int:
        """Evict what is too old and, of the rest, `wanted` bytes as far as they can be had; nothing if not `least`.

        The bytes that are free now.
        """
        if settle:
            await self._holdings.settle()
        found = await self._plan(wanted)
        return sum(await self._carry_out(found)) if found.nbytes >= least else 0

    async def _plan(self, wanted: int) -> EvictionPlan:
        """Who is to go. What has changed meanwhile is looked at again when it is carried out."""
        busy = self._planner.busy_blobs()
        candidates: list[Candidate] = []
        for turn in in_turns(state for state in self._catalog.states() if state.present_bytes):
            candidates += [self._candidate(state, busy) for state in turn if self._planner.knows(state.id)]
            await trio.lowlevel.checkpoint()
        now, max_age = blobs.wall_clock(), self._settings.max_age
        plan_them = partial(plan_evictions, candidates, wanted=wanted, now=now, max_age=max_age)
        return await trio.to_thread.run_sync(plan_them)

    def _candidate(self, state: BlobState, busy: set[BlobId]) -> Candidate:
        pinned, in_use = self._catalog.is_kept(state.id), self._in_use(state) or state.id in busy
        nbytes = self._planner.holding(state.id)
        exempt = pinned or in_use
        runs = () if exempt or state.whole else state.uses.runs(state.durable, state.shape)
        return Candidate(state.id, nbytes, state.uses.last, pinned, in_use, runs)

    @staticmethod
    def _in_use(state: BlobState) -> bool:
        return bool(state.handles or state.completing)

    async def _carry_out(self, found: EvictionPlan) -> list[int]:
        """What each eviction made free, in bytes of chunks."""
        return [await self._take_out(eviction) for eviction in found.evictions]

    async def _take_out(self, eviction: Eviction) -> int:
        state = self._catalog.get(eviction.blob)
        if state is None:
            return 0

        def may() -> bool:
            busy = self._planner.busy(state.id) or self._planner.waiting(state.id) > 0
            return not (busy or self._in_use(state) or self._catalog.is_kept(state.id))

        spans = eviction.chunks
        chunks = None if spans is None else [chunk for span in spans for chunk in span]
        freed, on_disk = await self._holdings.evict(state, chunks, may)
        if freed:
            self.evicted_bytes += freed
            self._log(eviction, state, freed, on_disk)
        return freed

    def _log(self, eviction: Eviction, state: BlobState, freed: int, on_disk: int) -> None:
        why = "" if eviction.aged else " to make room"
        log.info(
            "evicted %s of %s%s, not used for %s; %s are free on the disk now",
            format_size(freed), state.ref, why, format_duration(eviction.idle), format_size(on_disk),
        )  # fmt: skip

    def _describe(self, eviction: Eviction) -> EvictedStatus | None:
        """None if its blob was removed while there was planned."""
        state = self._catalog.get(eviction.blob)
        if state is None:
            return None
        whole = eviction.chunks is None or eviction.nbytes >= state.present_bytes
        return EvictedStatus(state.ref, str(state.id), eviction.nbytes, eviction.idle, whole)

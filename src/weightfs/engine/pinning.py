"""What is pinned, and how that changes: refs are added, followed, marked and removed.

Rules: what is pinned changes one ref at a time, so a blob that is being removed cannot be added meanwhile; an origin is
asked before that, never within. A change is not left half done by who gives up waiting for it. What a ref was before
goes when nobody has it open any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import trio

from weightfs.core import plan
from weightfs.core.manifest import BlobId, Manifest, Policy
from weightfs.core.planner import Planner
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog, Put
from weightfs.engine.committer import Committer
from weightfs.engine.fetcher import Fetcher
from weightfs.engine.headers import Headers
from weightfs.engine.holdings import Holdings
from weightfs.engine.keeping import Keeper
from weightfs.engine.origins import Origins
from weightfs.engine.room import Room
from weightfs.engine.seal import Sealer
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.status import Outcome, RefUpdate
from weightfs.engine.turns import in_turns, taken_in_turns
from weightfs.engine.uncached import Uncached
from weightfs.engine.workers import WorkerPool
from weightfs.errors import CacheError, FailureKind, IntegrityError, ReadError, SourceError
from weightfs.sources import home_of, keeps_headers
from weightfs.store.cache import Cache, StoredRef

log = logging.getLogger(__name__)


class Pinning:
    """One per engine. `changed()` is called when other refs are pinned than before."""

    def __init__(
        self,
        *,
        cache: Cache,
        catalog: Catalog,
        planner: Planner,
        fetcher: Fetcher,
        holdings: Holdings,
        uncached: Uncached,
        committer: Committer,
        room: Room,
        sealer: Sealer,
        keeper: Keeper,
        headers: Headers,
        origins: Origins,
        pool: WorkerPool,
        settings: EngineSettings,
        changed: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._catalog = catalog
        self._planner = planner
        self._fetcher = fetcher
        self._holdings = holdings
        self._uncached = uncached
        self._committer = committer
        self._room = room
        self._sealer = sealer
        self._keeper = keeper
        self._headers = headers
        self._origins = origins
        self._pool = pool
        self._settings = settings
        self._changed = changed
        self._lock = trio.Lock()
        self._left: set[BlobId] = set()  # blobs without a ref that somebody still reads

    def reload(self, settings: EngineSettings) -> None:
        """Other settings, from now on."""
        self._settings = settings

    async def introduce(self, states: Sequence[BlobState]) -> None:
        """Let the planner know new blobs."""
        for turn in in_turns(states):
            for state in turn:
                leftover = state.whole and state.stale  # what was written and not recorded keeps its room
                kept = (
                    [chunk for chunk in state.shape.chunks if chunk not in state.present] if leftover else ()
                )
                self._fetcher.add(state, state.present, kept)
            await trio.lowlevel.checkpoint()

    async def begin(self, states: Sequence[BlobState]) -> None:
        """Have pinned blobs that the planner knows kept and sealed as their refs want."""
        for turn in in_turns(states):
            for state in turn:
                self._keeper.begin(state)
                if len(state.durable) > state.frontier or state.durable.full:
                    self._sealer.poke(state)
            await trio.lowlevel.checkpoint()

    async def add(self, ref: Ref, *, refresh: bool = False, headers: bool = True) -> Manifest:
        """Pin a ref and show it. A pinned one is served from the index without asking anybody, unless `refresh`.

        With `headers`, small files and headers that are not cached are then fetched in the background, if the settings
        have `headers_first`.
        SourceError, ChunkListError, SignatureError, CacheError.
        """
        known = self._catalog.ref(str(ref))
        if known is None or refresh:
            manifest = await self._resolve(ref, known)
        else:
            manifest = known.manifest
        if headers and self._settings.headers_first:
            self._headers.start(manifest)
        return manifest

    async def _resolve(self, ref: Ref, known: StoredRef | None) -> Manifest:
        """Ask what it is, and pin that."""
        if known is not None and known.manifest.ref != str(ref):
            ref = parse_ref(known.manifest.ref)  # as it was spelt when it was added
        async with self._origins.using(ref.scheme) as source:
            manifest = await source.resolve(ref)
        if home := home_of(ref, self._settings.fetch):
            self._pool.own(home)
        if self._settings.policy is Policy.HOLD and any(not entry.blob.digest for entry in manifest.entries):
            raise IntegrityError(
                f"{manifest.ref} has no digest to be verified with, and policy hold would wait for ever; "
                "add #sha256=<hex> to the ref, publish a .meta4, or use --policy provisional"
            )
        async with self._lock:
            if known is not None and self._catalog.ref(str(ref)) is None:
                raise ReadError(f"{ref} was removed meanwhile", kind=FailureKind.CANCELLED, ref=str(ref))
            with trio.CancelScope(shield=True):  # half of it would be a ref that is known and never shown
                put = await self._catalog.put(manifest, self.introduce)
                await self.begin(put.fresh)
                await self._follow(put)
        self._changed()
        if known is not None and _move(known, manifest.revision) is Outcome.ROLLED_BACK:
            log.warning(
                "%s went back to an older digest: from %s to %s",
                ref, known.manifest.revision, manifest.revision,
            )  # fmt: skip
        await self.tidy()
        return manifest

    async def _follow(self, put: Put) -> None:
        """Blobs that were known before are pinned once more, perhaps from other places or with a list of chunks."""
        for turn in in_turns(put.known):
            for state in turn:
                self._fetcher.feed(plan.Remirrored(state.id, state.mirrors))
                try:
                    if state.id in put.relisted:
                        await self._holdings.adopt(state)
                finally:  # the list counts from here on, recorded or not
                    self._uncached.changed(state)
                self._keeper.begin(state)
            await trio.lowlevel.checkpoint()

    async def update(self, ref_text: str) -> RefUpdate:
        """Ask what a known ref is now, and follow it there. KeyError if it is unknown; else as `add`."""
        before = self._catalog.known(ref_text)
        await self.add(parse_ref(before.manifest.ref), refresh=True)
        new = self._catalog.known(ref_text).manifest.revision
        return RefUpdate(before.manifest.ref, before.manifest.revision, new, _move(before, new))

    async def browse(self, ref: Ref) -> None:
        """Let a ref be known because somebody looked at its path: as `add`, and nothing of it is fetched.

        SourceError (AUTH) also if the configured headers would go to a host that nothing but the path has named.
        """
        if not keeps_headers(
            ref, self._settings.fetch, (stored.manifest.ref for stored in self._catalog.refs())
        ):
            raise SourceError(
                f"{ref} is not looked up: the configured headers would go to a host that nothing but a path has named; "
                "use `weightfs add`, or name the host in an [[endpoint]]",
                kind=FailureKind.AUTH,
            )
        await self.add(ref, headers=False)

    async def pin(self, ref_text: str, *, pinned: bool) -> None:
        """Keep all of a ref, from now on and after every start; or no longer. KeyError if it is unknown."""
        await self._mark(ref_text, pinned=pinned)
        self._room.poke()

    async def set_fill(self, ref_text: str, mode: FillMode | None) -> None:
        """How much of a ref is completed in the background, from now on and after every start; None: as configured.

        KeyError if it is unknown.
        """
        await self._mark(ref_text, fill="" if mode is None else mode.value)

    async def pause(self, ref_text: str, *, paused: bool) -> None:
        """Fetch nothing of a ref in the background, from now on and after every start; or again. KeyError."""
        await self._mark(ref_text, paused=paused)

    async def _mark(
        self,
        ref_text: str,
        *,
        pinned: bool | None = None,
        paused: bool | None = None,
        fill: str | None = None,
    ) -> None:
        async with self._lock:
            await self._catalog.mark(ref_text, pinned=pinned, paused=paused, fill=fill)
            with trio.CancelScope(shield=True):  # what is marked holds for all of its blobs
                for turn in in_turns(self._catalog.blobs(ref_text)):
                    for state in turn:
                        self._keeper.begin(state)
                        self._keeper.rest(state)
                    await trio.lowlevel.checkpoint()

    async def pause_all(self, *, paused: bool) -> None:
        """Fetch nothing at all in the background; or again what is not paused by itself."""
        async with self._lock:
            await self._catalog.pause_all(paused=paused)
            for turn in in_turns(self._catalog.states()):
                for state in turn:
                    self._keeper.weigh(state)
                await trio.lowlevel.checkpoint()

    async def remove(self, ref_text: str) -> int:
        """Forget a ref and delete what only it had; the bytes freed. KeyError if it is not pinned."""
        async with self._lock:
            with trio.CancelScope(shield=True):  # half a removal would leave files that nothing names
                states = self._catalog.blobs(ref_text)
                orphans = await self._catalog.remove(ref_text)
                others = [state for state in states if self._holdings.pinned(state)]
                del states
                self._changed()
                try:
                    freed = await self._delete(orphans)
                finally:
                    for turn in in_turns(others):
                        for state in turn:
                            self._keeper.weigh(state)
                            self._keeper.rest(state)
                        await trio.lowlevel.checkpoint()
        return freed

    def left(self, blob: BlobId) -> bool:
        """Whether the blob is only there because somebody had it open: `tidy` when nobody has."""
        return blob in self._left

    async def tidy(self) -> None:
        """Delete what no ref names any more, as soon as nobody has it open."""
        async with self._lock:
            with trio.CancelScope(shield=True):  # as in `remove`
                left = await self._catalog.unnamed()
                self._left = {state.id for state in left if state.handles}
                # `released` comes back to those that are open; so does the next start.
                going = [state for state in left if not state.handles]
                for state in going:
                    self._catalog.forget(state)
                name = going[0].ref if going else ""
                del left
                try:
                    await self._delete(going)
                except CacheError as error:
                    log.warning("what %s was before keeps its space: %s", name, error)

    async def _delete(self, states: list[BlobState]) -> int:
        """Delete blobs that the catalog has forgotten. The first CacheError is raised when all were tried."""
        freed = 0
        wrong: CacheError | None = None
        for turn in taken_in_turns(states):
            try:
                freed += await self._delete_turn(turn)
            except CacheError as error:
                wrong = wrong or error
        if wrong is not None:
            raise wrong
        return freed

    async def _delete_turn(self, states: Sequence[BlobState]) -> int:
        with contextlib.ExitStack() as leaving:
            for state in states:
                self._sealer.forget(state)
                state.generation += 1
                leaving.enter_context(self._room.leaving(state))
                self._fetcher.remove(state.id)
                state.notify()
            for state in states:
                await self._uncached.remove(state)
                await self._fetcher.drained(state)  # a job's last chunk may still be on its way to the file
                async with state.preparing:  # nobody makes its file any more, since it is not pinned
                    await self._committer.forget(state.id)
            return await trio.to_thread.run_sync(self._cache.delete_blobs, [state.id for state in states])


def _move(before: StoredRef, revision: str) -> Outcome:
    if revision == before.manifest.revision:
        return Outcome.UNCHANGED
    return Outcome.ROLLED_BACK if revision in before.previous else Outcome.UPDATED

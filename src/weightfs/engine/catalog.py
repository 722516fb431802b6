"""What is pinned: refs, their manifests, and one `BlobState` for every blob that any of them names.

Rules: the index is the truth; memory is made from it at start and changed only after the index was. A ref is found
under every spelling of its name (`core.names.identity`), and stays under the one with which it was added. A ref may
have 100,000 files: what has to be done for each of them is done in a thread, and shown in one step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import trio

from weightfs.core.manifest import Blob, BlobId, Manifest, Policy, Trust
from weightfs.core.mirror_rules import with_twins
from weightfs.core.mirrors import joined
from weightfs.core.names import identity
from weightfs.core.readahead import ReadAhead
from weightfs.core.uses import Uses
from weightfs.engine.blobs import BlobState
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.engine.turns import in_turns
from weightfs.errors import CacheError
from weightfs.store.cache import Cache, Progress, RunState, StoredRef

log = logging.getLogger(__name__)

_ORDER: Final = (FillMode.NEVER, FillMode.OPENED, FillMode.ALL)


@dataclass(frozen=True, slots=True)
class Put:
    """What pinning a manifest came to. `fresh` are the blobs that were not known, `known` the others, each once.

    `relisted`: those of `known` for which the index has a chunk list that memory has not.
    """

    fresh: list[BlobState]
    known: list[BlobState]
    relisted: frozenset[BlobId]


@dataclass(frozen=True, slots=True)
class _Marks:
    """What follows for each blob from the marks of the refs that name it."""

    kept: frozenset[BlobId] = frozenset()  # blobs of pinned refs
    going: frozenset[BlobId] = frozenset()  # blobs of refs that are not paused
    modes: dict[BlobId, FillMode] = field(default_factory=dict)  # of blobs whose mode somebody set


class Catalog:
    """Owned by the trio thread."""

    def __init__(self, cache: Cache, settings: EngineSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._refs: dict[str, StoredRef] = {}  # by identity
        self._states: dict[BlobId, BlobState] = {}
        self._marks = _Marks()
        self.all_paused = False

    def states(self) -> list[BlobState]:
        """All blobs."""
        return list(self._states.values())

    def get(self, id: BlobId) -> BlobState | None:  # noqa: A002 - the field's name
        """The blob's state, or None."""
        return self._states.get(id)

    def state(self, id: BlobId) -> BlobState:  # noqa: A002
        """The blob's state. KeyError if it is not pinned."""
        return self._states[id]

    def refs(self) -> list[StoredRef]:
        """In the order of their names."""
        return sorted(self._refs.values(), key=lambda stored: stored.manifest.ref)

    def manifests(self) -> tuple[Manifest, ...]:
        """Of all refs."""
        return tuple(stored.manifest for stored in self.refs())

    def ref(self, ref: str) -> StoredRef | None:
        """One ref, or None."""
        return self._refs.get(identity(ref))

    def known(self, ref: str) -> StoredRef:
        """One ref. KeyError if it is unknown."""
        stored = self.ref(ref)
        if stored is None:
            raise KeyError(ref)
        return stored

    def is_kept(self, id: BlobId) -> bool:  # noqa: A002
        """Whether a ref that is to be kept whole names the blob."""
        return id in self._marks.kept

    def is_paused(self, id: BlobId) -> bool:  # noqa: A002
        """Whether every ref that names the blob is paused."""
        return self.all_paused or id not in self._marks.going

    def mode(self, id: BlobId) -> FillMode:  # noqa: A002
        """How much of the blob is completed in the background: by the ref that asks for most of those that name it."""
        return self._marks.modes.get(id, self._settings.fill)

    def files(self, ref: str) -> list[tuple[str, BlobState]]:
        """(path below `models/`, state) of everything that a ref names. KeyError if it is unknown."""
        manifest = self._refs[identity(ref)].manifest
        return [(f"{manifest.tree}/{entry.path}", self._states[entry.blob.id]) for entry in manifest.entries]

    def blobs(self, ref: str) -> list[BlobState]:
        """The states of everything that a ref names, each once. KeyError if it is unknown."""
        entries = self._refs[identity(ref)].manifest.entries
        return [self._states[blob] for blob in dict.fromkeys(entry.blob.id for entry in entries)]

    def load(self) -> None:
        """Read everything from the index, and delete what no ref names. Blocks; before anything else."""
        # Left by a ref that moved on, or by a removal that was cut short.
        if orphans := self._cache.orphans():
            try:
                freed = self._cache.delete_blobs(orphans)
            except CacheError as error:
                log.warning("what no model names keeps its space: %s", error)
            else:
                log.info("%d blobs, which no model names, were deleted: %d bytes", len(orphans), freed)
        for stored in self._cache.refs():
            self._refs[identity(stored.manifest.ref)] = stored
            self._states.update((state.id, state) for state in self._join(stored, self._states.keys()))
        self.all_paused = self._cache.paused()
        self._marks = self._marks_of(list(self._refs.values()))

    async def put(
        self, manifest: Manifest, introduce: Callable[[Sequence[BlobState]], Awaitable[None]]
    ) -> Put:
        """Pin a manifest. `introduce` is given the states of new blobs before anybody finds them here."""
        known = self.ref(manifest.ref)
        if known is not None and known.manifest.ref != manifest.ref:  # another spelling, at the same time
            manifest = replace(manifest, ref=known.manifest.ref, tree=known.manifest.tree)
        name = identity(manifest.ref)
        others = [stored for key, stored in self._refs.items() if key != name]
        stored, fresh, marks = await trio.to_thread.run_sync(
            self._put, manifest, known, others, frozenset(self._states)
        )
        await introduce(fresh)
        self._states.update((state.id, state) for state in fresh)
        self._refs[name], self._marks = stored, marks
        return await self._follow(stored, fresh, manifest)

    def _put(
        self,
        manifest: Manifest,
        before: StoredRef | None,
        others: list[StoredRef],
        known: frozenset[BlobId],
    ) -> tuple[StoredRef, list[BlobState], _Marks]:
        # The shape of what is known here is the planner's and the workers' too: it does not change while we run.
        for note in self._cache.put_ref(manifest, now=int(time.time()), in_use=known):
            log.warning("%s: %s", manifest.ref, note)
        stored = self._cache.ref(manifest.ref)
        if stored is None:
            raise CacheError(f"{manifest.ref} was removed from the index by somebody else")
        if before is not None and stored.manifest == before.manifest:  # the same, not twice in memory
            stored = replace(stored, manifest=before.manifest)
        return stored, self._join(stored, known), self._marks_of([*others, stored])

    async def _follow(self, stored: StoredRef, fresh: list[BlobState], given: Manifest) -> Put:
        """Have blobs that were known before be had from where this manifest has them, too."""
        new = {state.id for state in fresh}
        known: dict[BlobId, BlobState] = {}
        relisted: set[BlobId] = set()
        for turn in in_turns(zip(stored.manifest.entries, given.entries, strict=True)):
            for kept, entry in turn:
                state = self._states[kept.blob.id]
                if state.id not in new:
                    known[state.id] = state
                    state.blob = self._placed(state.blob, entry.blob)
                    if kept.blob.chunk_list not in (None, state.blob.chunk_list):
                        relisted.add(state.id)
            await trio.lowlevel.checkpoint()
        return Put(fresh, list(known.values()), frozenset(relisted))

    def _join(self, stored: StoredRef, known: Collection[BlobId]) -> list[BlobState]:
        """The states of those blobs of a ref that are not `known`. Blocks."""
        # The store's word on shape and list: it may have kept those under which chunks are recorded.
        fresh = {entry.blob.id: entry.blob for entry in stored.manifest.entries}
        return [self._state(blob, stored) for id, blob in fresh.items() if id not in known]  # noqa: A001

    def _state(self, kept: Blob, stored: StoredRef) -> BlobState:
        progress, (occupied, written_at) = self._cache.progress(kept.id), self._cache.occupancy(kept.id)
        run, trust = _founded(kept, progress)
        present_bytes = progress.present.byte_count(kept.shape)
        state = BlobState(
            blob=with_twins(kept, self._settings.mirrors),
            ref=stored.manifest.ref,
            path=self._cache.path(kept.id),
            present=progress.present,
            durable=progress.present.copy(),
            suspect=progress.suspect,
            readahead=ReadAhead(kept.shape, max_window=self._settings.readahead_bytes),
            policy=kept.policy if self._settings.policy is Policy.PROVISIONAL else self._settings.policy,
            trust=trust,
            run=run,
            resumed=run.frontier if run else 0,
            mtime=stored.added_at,
            present_bytes=present_bytes,
            uses=Uses(kept.shape, progress.use.times, landed=written_at),
            whole=progress.use.whole,
            # By less than a chunk, it is the filesystem's own way to count.
            stale=occupied >= present_bytes + kept.shape.chunk_length,
        )
        if trust is Trust.QUARANTINED:
            state.faults.refuted()
        return state

    def _placed(self, blob: Blob, also: Blob) -> Blob:
        """`blob`, to be had where both are, and where the configuration has twins of these places."""
        mirrors = joined(blob.mirrors, also.mirrors)
        if mirrors == blob.mirrors:
            return blob
        return with_twins(blob.with_mirrors(mirrors), self._settings.mirrors)

    async def unnamed(self) -> list[BlobState]:
        """Blobs that no ref names any more: a refresh moved their ref to other content."""

        def find(refs: list[StoredRef], known: list[BlobId]) -> list[BlobId]:
            named = set(_blobs(refs))
            return [blob for blob in known if blob not in named]

        found = await trio.to_thread.run_sync(find, list(self._refs.values()), list(self._states))
        return [self._states[blob] for blob in found]

    def forget(self, state: BlobState) -> None:
        """The blob is being deleted."""
        self._states.pop(state.id, None)

    async def remove(self, ref: str) -> list[BlobState]:
        """Unpin; the states of blobs that no ref names any more. KeyError if it is not pinned."""
        key = identity(ref)
        name = self._refs[key].manifest.ref
        others = [stored for other, stored in self._refs.items() if other != key]

        def work() -> tuple[list[BlobId], _Marks]:
            return self._cache.remove_ref(name), self._marks_of(others)

        orphans, self._marks = await trio.to_thread.run_sync(work)
        del self._refs[key]
        return [state for blob in orphans if (state := self._states.pop(blob, None))]

    async def mark(
        self, ref: str, *, pinned: bool | None = None, paused: bool | None = None, fill: str | None = None
    ) -> None:
        """Note what is wanted of a ref; None leaves a mark as it is. KeyError if it is not pinned."""
        key = identity(ref)
        name = self._refs[key].manifest.ref
        given = {"pinned": pinned, "paused": paused, "fill": fill}
        marks: dict[str, Any] = {mark: value for mark, value in given.items() if value is not None}
        refs = self._refs | {key: replace(self._refs[key], **marks)}

        def work() -> _Marks:
            self._cache.mark_ref(name, pinned=pinned, paused=paused, fill=fill)
            return self._marks_of(list(refs.values()))

        self._marks = await trio.to_thread.run_sync(work)
        self._refs = refs

    async def pause_all(self, *, paused: bool) -> None:
        """Pause everything, also what comes later; or take that back."""
        await trio.to_thread.run_sync(partial(self._cache.pause, paused=paused))
        self.all_paused = paused

    def _marks_of(self, refs: list[StoredRef]) -> _Marks:
        modes: dict[BlobId, FillMode] = {}
        if any(stored.fill for stored in refs):
            by_mode = sorted(refs, key=lambda stored: _ORDER.index(self._mode_of(stored)))
            for stored in by_mode:  # the most generous is the last word
                modes.update(dict.fromkeys(_blobs([stored]), self._mode_of(stored)))
        return _Marks(
            kept=frozenset(_blobs(stored for stored in refs if stored.pinned)),
            going=frozenset(_blobs(stored for stored in refs if not stored.paused)),
            modes=modes,
        )

    def _mode_of(self, stored: StoredRef) -> FillMode:
        try:
            return FillMode(stored.fill or self._settings.fill)
        except ValueError:  # a mode of a later version
            return self._settings.fill


def _blobs(refs: Iterable[StoredRef]) -> Iterator[BlobId]:
    return (entry.blob.id for stored in refs for entry in stored.manifest.entries)


def _founded(blob: Blob, progress: Progress) -> tuple[RunState | None, Trust]:
    """Running hash and trust, as far as every chunk on which they rest is there, or bound by a trusted list."""
    hole = progress.present.first_hole()
    if hole is None or (blob.chunk_list is not None and blob.chunk_list.trusted):
        return progress.run, progress.trust
    run = progress.run if progress.run is not None and progress.run.frontier <= hole else None
    return run, blob.initial_trust if progress.trust is Trust.VERIFIED else progress.trust

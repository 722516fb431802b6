"""What is pinned: refs, their manifests, and one `BlobState` for every blob that any of them names.

Rules: the index is the truth; memory is made from it at start and changed only after the index was. A ref is found
under every spelling of its name (`core.names.identity`), and stays under the one with which it was added.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
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
from weightfs.errors import CacheError
from weightfs.store.cache import Cache, Progress, RunState, StoredRef

log = logging.getLogger(__name__)

_ORDER: Final = (FillMode.NEVER, FillMode.OPENED, FillMode.ALL)

_Recalled = tuple[Blob, Progress, tuple[int, int]]


class Catalog:
    """Owned by the trio thread."""

    def __init__(self, cache: Cache, settings: EngineSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._refs: dict[str, StoredRef] = {}  # by identity
        self._states: dict[BlobId, BlobState] = {}
        self._kept: frozenset[BlobId] = frozenset()  # blobs of pinned refs
        self._going: frozenset[BlobId] = frozenset()  # blobs of refs that are not paused
        self._modes: dict[BlobId, FillMode] = {}  # of blobs whose mode somebody set
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
        return id in self._kept

    def is_paused(self, id: BlobId) -> bool:  # noqa: A002
        """Whether every ref that names the blob is paused."""
        return self.all_paused or id not in self._going

    def mode(self, id: BlobId) -> FillMode:  # noqa: A002
        """How much of the blob is completed in the background: by the ref that asks for most of those that name it."""
        return self._modes.get(id, self._settings.fill)

    def files(self, ref: str) -> list[tuple[str, BlobState]]:
        """(path below `models/`, state) of everything that a ref names. KeyError if it is unknown."""
        manifest = self._refs[identity(ref)].manifest
        return [(f"{manifest.tree}/{entry.path}", self._states[entry.blob.id]) for entry in manifest.entries]

    def load(self) -> None:
        """Read everything from the index, and delete what no ref names. Blocks; before anything else."""
        for blob in self._cache.orphans():  # left by a ref that moved on, or by a removal that was cut short
            try:
                freed = self._cache.delete_blob(blob)
            except CacheError as error:
                log.warning("blob %s, which no model names, keeps its space: %s", blob, error)
            else:
                log.info("blob %s, which no model names, was deleted: %d bytes", blob, freed)
        for stored in self._cache.refs():
            self._refs[identity(stored.manifest.ref)] = stored
            for entry in stored.manifest.entries:
                self._note(entry.blob, stored, self._recall(entry.blob))
        self.all_paused = self._cache.paused()
        self._count()

    async def put(self, manifest: Manifest) -> list[BlobState]:
        """Pin a manifest; the states of its blobs, new ones and known ones."""
        known = self.ref(manifest.ref)
        if known is not None and known.manifest.ref != manifest.ref:  # another spelling, at the same time
            manifest = replace(manifest, ref=known.manifest.ref, tree=known.manifest.tree)
        stored, recalled = await trio.to_thread.run_sync(self._put, manifest, frozenset(self._states))
        self._refs[identity(manifest.ref)] = stored
        self._count()
        return [self._note(entry.blob, stored, recalled[entry.blob.id]) for entry in manifest.entries]

    def _put(self, manifest: Manifest, known: frozenset[BlobId]) -> tuple[StoredRef, dict[BlobId, _Recalled]]:
        # The shape of what is known here is the planner's and the workers' too: it does not change while we run.
        for note in self._cache.put_ref(manifest, now=int(time.time()), in_use=known):
            log.warning("%s: %s", manifest.ref, note)
        stored = self._cache.ref(manifest.ref)
        if stored is None:
            raise CacheError(f"{manifest.ref} was removed from the index by somebody else")
        return stored, {entry.blob.id: self._recall(entry.blob) for entry in manifest.entries}

    def _recall(self, blob: Blob) -> _Recalled:
        """The store's word on shape and list: it may have kept those under which chunks are recorded."""
        return (
            self._cache.blob(blob.id) or blob,
            self._cache.progress(blob.id),
            self._cache.occupancy(blob.id),
        )

    def _note(self, blob: Blob, stored: StoredRef, recalled: _Recalled) -> BlobState:
        known = self._states.get(blob.id)
        if known is not None:
            known.blob = self._placed(known.blob, blob)
            return known
        kept, progress, (occupied, written_at) = recalled
        run, trust = _founded(kept, progress)
        present_bytes = progress.present.byte_count(kept.shape)
        state = BlobState(
            blob=self._placed(kept, blob),
            ref=stored.manifest.ref,
            path=self._cache.path(blob.id),
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
        self._states[blob.id] = state
        return state

    def _placed(self, blob: Blob, also: Blob) -> Blob:
        """`blob`, to be had where both are, and where the configuration has twins of these places."""
        return with_twins(blob.with_mirrors(joined(blob.mirrors, also.mirrors)), self._settings.mirrors)

    def unnamed(self) -> list[BlobState]:
        """Blobs that no ref names any more: a refresh moved their ref to other content."""
        named = {entry.blob.id for stored in self._refs.values() for entry in stored.manifest.entries}
        return [state for blob, state in self._states.items() if blob not in named]

    def forget(self, state: BlobState) -> None:
        """The blob is being deleted."""
        self._states.pop(state.id, None)

    async def remove(self, ref: str) -> list[BlobState]:
        """Unpin; the states of blobs that no ref names any more. KeyError if it is not pinned."""
        name = self._refs[identity(ref)].manifest.ref
        orphans = await trio.to_thread.run_sync(self._cache.remove_ref, name)
        del self._refs[identity(ref)]
        self._count()
        return [state for blob in orphans if (state := self._states.pop(blob, None))]

    async def mark(
        self, ref: str, *, pinned: bool | None = None, paused: bool | None = None, fill: str | None = None
    ) -> None:
        """Note what is wanted of a ref; None leaves a mark as it is. KeyError if it is not pinned."""
        name = self._refs[identity(ref)].manifest.ref
        await trio.to_thread.run_sync(
            partial(self._cache.mark_ref, name, pinned=pinned, paused=paused, fill=fill)
        )
        given = {"pinned": pinned, "paused": paused, "fill": fill}
        marks: dict[str, Any] = {mark: value for mark, value in given.items() if value is not None}
        self._refs[identity(ref)] = replace(self._refs[identity(ref)], **marks)
        self._count()

    async def pause_all(self, *, paused: bool) -> None:
        """Pause everything, also what comes later; or take that back."""
        await trio.to_thread.run_sync(partial(self._cache.pause, paused=paused))
        self.all_paused = paused

    def _count(self) -> None:
        """What follows for each blob from the marks of the refs that name it."""
        refs = self._refs.values()
        self._kept = frozenset(_blobs(stored for stored in refs if stored.pinned))
        self._going = frozenset(_blobs(stored for stored in refs if not stored.paused))
        self._modes = {}
        if any(stored.fill for stored in refs):
            by_mode = sorted(refs, key=lambda stored: _ORDER.index(self._mode_of(stored)))
            for stored in by_mode:  # the most generous is the last word
                self._modes.update(dict.fromkeys(_blobs([stored]), self._mode_of(stored)))

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

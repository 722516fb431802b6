"""The cache: sparse data files and their index, and the order in which the two change.

Rules that hold here:

- Landing: a data file is synced, and then its records are committed. `landing` has the rules, also for failed syncs.
- Dropping: the records are committed as absent, and then the space is given back. `evicting` has the rules for blobs
  that readers may have mapped.
- Deleting: the records go, with a note that the file is doomed; then the file; then the note.
- `_changes` makes these sequences exclude one another. Reading takes no lock but the descriptor table's, which is
  never held across a system call that may wait: `read_nowait` cannot be held up by a sync.

Everything blocks, and belongs into a thread, but what says "Memory". All methods may be called from several threads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ByteSpan, ChunkSpan
from weightfs.core.manifest import Blob, BlobId, Manifest, Trust
from weightfs.errors import CacheError
from weightfs.store import backup, evicting, ledger, lockfile, opening, refs, trial
from weightfs.store.disk import disk_errors
from weightfs.store.evicting import Use
from weightfs.store.index import Txn
from weightfs.store.landing import Recorder
from weightfs.store.ledger import Landing
from weightfs.store.records import (
    BlobRecord,
    ChunkState,
    RunState,
)
from weightfs.store.refs import StoredRef
from weightfs.store.sparse import SparseFiles

__all__ = ["Cache", "ChunkState", "Landing", "Progress", "RunState", "StoredRef"]

log = logging.getLogger(__name__)

_NONE: Mapping[BlobId, Any] = MappingProxyType({})


@dataclass(slots=True)
class Progress:
    """What is recorded of one blob. `suspect` chunks are present, and must be hashed before they are served."""

    present: ChunkSet
    suspect: ChunkSet
    run: RunState | None
    trust: Trust
    use: Use


class Cache:
    """An open cache directory. Close it, or the next start counts this stop as a crash."""

    def __init__(self, root: Path, lock: int, opened: opening.Opened, files: SparseFiles) -> None:
        self.root = root
        self.epoch = opened.state.epoch
        self.instance = opened.state.instance
        self.was_clean = opened.was_clean
        self._lock = lock
        self._index = opened.index
        self._files = files
        self._recorder = Recorder(opened.index, files, opened.state.epoch)
        self._state = opened.state
        self._changes = threading.Lock()
        self._preparing = threading.Lock()
        self._prepared: set[BlobId] = set()
        self._closed = False
        self._copier = backup.Copier(root, opened.index, opened.copied)

    @classmethod
    def open(cls, root: Path, *, create: bool = True, now: int) -> Cache:  # noqa: ARG003 - part of the interface
        """Take a cache directory into use.

        Raises:
            CacheBusyError: another process owns it.
            CacheFormatError: a newer weightfs made it.
            CacheCorruptError: the index cannot be read, nor a new one be made.
            CacheError: anything else that is wrong with the directory.
        """
        root = root.absolute()
        opening.make_directories(root, create=create)
        lock = lockfile.acquire(root / "lock")
        try:
            files = SparseFiles(root / "blobs")
            opened = opening.open_index(root, files)
            try:
                cache = cls(root, lock, opened, files)
                cache._delete_doomed()
            except BaseException:
                opened.index.abandon()
                raise
        except BaseException:
            lockfile.release(lock)
            raise
        return cache

    @property
    def lock_fd(self) -> int:
        """The lock's descriptor. Fetch workers inherit it: the cache is free only when its last writer has ended."""
        return self._lock

    def close(self) -> None:
        """Write the clean flag and give the lock back. A cache that cannot be written is left as after a crash."""
        with self._changes, self._preparing:
            if self._closed:
                return
            self._closed = True
            try:
                # Before the clean flag: whoever goes on from a copy has to hash everything.
                copied = self._copier.finish()
                self._index.write(lambda txn: opening.end(txn, self._files, self._state, copied))
                self._index.close()
            except CacheError as error:
                log.warning("the cache %s was not closed cleanly: %s", self.root, error)
                self._index.abandon()
            finally:
                self._files.close()
                lockfile.release(self._lock)

    # Refs

    def refs(self) -> list[StoredRef]:
        """Every ref, ordered by its text."""
        with self._index.read() as txn:
            return refs.every(txn)

    def ref(self, ref: str) -> StoredRef | None:
        """The ref of exactly this text."""
        with self._index.read() as txn:
            return refs.one(txn, ref)

    def ref_names(self) -> list[str]:
        """The texts of all refs, ordered: without their manifests, which may be large."""
        with self._index.read() as txn:
            return refs.names(txn)

    def put_ref(
        self, manifest: Manifest, *, now: int, in_use: Collection[BlobId] = frozenset()
    ) -> tuple[str, ...]:
        """Record a ref, its blobs and their lists in one synced transaction.

        A ref that is known keeps its earlier revisions, and keeps its marks; a blob that is known is joined by
        the rules of `store.merging`. Blobs `in_use`, and those that were prepared, keep their chunk length. Returns
        sentences about what was not taken over as given. IntegrityError, ChunkListError.
        """
        with self._changes, self._preparing:  # no file is prepared for a shape that is about to change
            fixed = self._prepared.union(in_use)
            notes = self._index.write(lambda txn: refs.put(txn, manifest, in_use=fixed, now=now))
            self._copier.changed()
            return notes

    def mark_ref(
        self, ref: str, *, pinned: bool | None = None, paused: bool | None = None, fill: str | None = None
    ) -> bool:
        """Note what people want of a ref; None leaves a mark as it is. Whether the ref is known."""
        with self._changes:
            known = self._index.write(
                lambda txn: refs.mark(txn, ref, pinned=pinned, paused=paused, fill=fill)
            )
            self._copier.changed()
            return known

    def pause(self, *, paused: bool) -> None:
        """Note that nothing at all is to be fetched in the background, or that this is over."""
        with self._changes:
            self._index.write(lambda txn: refs.pause_all(txn, paused))
            self._copier.changed()

    def paused(self) -> bool:
        """What `pause` noted."""
        with self._index.read() as txn:
            return refs.all_paused(txn)

    def remove_ref(self, ref: str) -> list[BlobId]:
        """Forget a ref (nothing happens if it is unknown). Returns its blobs that no other ref names."""
        with self._changes:
            orphans = self._index.write(lambda txn: refs.remove(txn, ref))
            self._copier.changed()
            return orphans

    def orphans(self) -> list[BlobId]:
        """Blobs that no ref names: left by a removed ref, or by one that moved to another revision."""
        with self._index.read() as txn:
            return sorted({record.blob.id for record in ledger.blob_records(txn)} - refs.named(txn))

    # Blobs

    def blob(self, id: BlobId) -> Blob | None:  # noqa: A002 - the field's word
        """The blob with its chunk list, or None."""
        with self._index.read() as txn:
            record = ledger.blob_record(txn, id)
            return None if record is None else ledger.whole_blob(txn, record)

    def delete_blob(self, id: BlobId) -> int:  # noqa: A002
        """Forget a blob and delete its file. Returns the bytes that the file occupied."""

        def job(txn: Txn) -> None:
            ledger.forget_blob(txn, id)
            txn.put_sealed("doomed", id.raw, b"")

        with self._changes, self._preparing:
            self._index.write(job)
            return self._finish_deletion(id)

    def _finish_deletion(self, blob: BlobId) -> int:
        freed = self._files.remove(blob)
        self._prepared.discard(blob)
        self._recorder.deleted(blob)
        self._index.write(lambda txn: txn.delete("doomed", blob.raw))
        return freed

    def _delete_doomed(self) -> None:
        for blob in evicting.settle_doomed(self._index):
            self._finish_deletion(blob)

    def progress(self, id: BlobId) -> Progress:  # noqa: A002
        """What is recorded of a blob: a copy, from its bitmaps. CacheError if the blob is unknown."""
        with self._index.read() as txn:
            record = self._record(txn, id)
            bits = ledger.load_bits(txn, id, record.blob.shape)
            run = ledger.load_run(txn, id, record.blob.shape)
            use = evicting.load_use(txn, id)
        return Progress(bits.present, bits.suspect, run, record.trust, use)

    def digests(self, id: BlobId, chunks: ChunkSpan) -> dict[int, bytes]:  # noqa: A002
        """The recorded digests of these chunks, of those too whose bytes were dropped."""
        with self._index.read() as txn:
            shape = self._record(txn, id).blob.shape
            span = chunks.intersect(shape.chunks)
            return {chunk: record.digest for chunk, record in ledger.chunk_records(txn, id, shape, span)}

    def sources(self, id: BlobId, chunks: ChunkSpan) -> dict[int, int]:  # noqa: A002
        """The numbers of the mirrors that gave these chunks; 255 stands for all from there on."""
        with self._index.read() as txn:
            shape = self._record(txn, id).blob.shape
            span = chunks.intersect(shape.chunks)
            return {chunk: record.source for chunk, record in ledger.chunk_records(txn, id, shape, span)}

    def required_digests(self, id: BlobId, chunks: ChunkSpan) -> dict[int, bytes]:  # noqa: A002
        """What a fetched chunk must hash to, where that is known: from a trusted list, or proven once.

        `commit` refuses a landing that differs, so a fetch compares with this before it calls a chunk landed.
        """
        with self._index.read() as txn:
            record = self._record(txn, id)
            return ledger.required_digests(txn, record, chunks.intersect(record.blob.shape.chunks))

    # Data

    def path(self, id: BlobId) -> Path:  # noqa: A002
        """Where the blob's file is or will be. Memory."""
        return self._files.path(id)

    def prepare(self, id: BlobId) -> Path:  # noqa: A002
        """Make sure of the blob's sparse file at full length, and return its path.

        DiskFault if chunks count on a file that is gone, shorter or another one: `drop` the whole blob first, and
        everything that was landed in it but not committed.
        """
        with self._preparing:
            with self._index.read() as txn:
                shape = self._record(txn, id).blob.shape
                keep = len(ledger.load_bits(txn, id, shape).present) > 0
            self._prepared.add(id)
            return self._files.prepare(id, shape.size, keep=keep)

    def file_identity(self, id: BlobId) -> tuple[int, int] | None:  # noqa: A002
        """Device and inode of the file that `read` reads: whoever writes must write that one. Memory."""
        return self._files.identity(id)

    def read(self, id: BlobId, span: ByteSpan) -> bytes:  # noqa: A002
        """Exactly the bytes of `span` from the file. DiskFault on EIO, and on a missing, replaced or short file.

        Whether the chunks are present is the caller's to know, before and after: a chunk that is dropped meanwhile
        reads as zeros.
        """
        return self._files.read(id, span)

    def read_nowait(self, id: BlobId, span: ByteSpan) -> bytes | None:  # noqa: A002
        """The same, if it needs no disk: None if it would wait, the file is not open yet, or anything is wrong."""
        return self._files.read_nowait(id, span)

    def forget_pages(self, id: BlobId, span: ByteSpan) -> None:  # noqa: A002
        """Tell the kernel that these pages of the file need not stay in memory. Memory."""
        self._files.forget_pages(id, span)

    def commit(
        self,
        landings: Sequence[Landing],
        *,
        runs: Mapping[BlobId, RunState] = _NONE,
        trusts: Mapping[BlobId, Trust] = _NONE,
        rehashed: Mapping[BlobId, ChunkSet] = _NONE,
        now: int,
    ) -> None:
        """Make landings durable: sync every touched data file, then commit the records in one synced transaction.

        What is said of a blob that was deleted meanwhile is ignored. A running hash that is ahead of the recorded
        digests is not kept. If one blob's file fails, the other blobs are recorded all the same, and then the error
        is raised: nothing of the failed blob is recorded, and what was not recorded of it is lost; `drop` every
        chunk that `progress` does not show as present, and fetch again. Until each chunk was dropped, or the doubt was
        forgiven (`forgive`), it is not recorded.

        Raises:
            DiskFault, NoSpaceError: a data file or the index could not be written.
            IntegrityError: a landing differs from `required_digests`; it was left out.
        """
        with self._changes:
            self._recorder.commit(landings, runs, trusts, rehashed, now)

    def doubt(self, id: BlobId) -> object | None:  # noqa: A002
        """A token of the last failed sync of a blob's file: nothing written before it is recorded. Memory."""
        return self._recorder.doubt(id)

    def renew(self, id: BlobId) -> None:  # noqa: A002
        """After a failed sync: have kernel and filesystem forget what they hold of chunks that are not recorded.

        Else what is written there again may be lost without an error. The kernel keeps the pages of a failed write as
        if they had been written; ext4 then never learns that their blocks are in use, and they read as zeros as soon
        as the pages are gone (seen on Linux 6.18). Nobody may count on bytes of these chunks. CacheError: the doubt
        stays.
        """
        with self._changes:
            with self._index.read() as txn:
                shape = self._record(txn, id).blob.shape
            self._recorder.renew(id, shape)

    def forgive(self, id: BlobId, doubt: object) -> None:  # noqa: A002
        """Whatever is committed from now on was written after that failed sync, which the caller vouches for. Memory.

        Nothing happens if another sync has failed since.
        """
        self._recorder.forgive(id, doubt)

    def drop(self, id: BlobId, chunks: ChunkSpan | ChunkSet, *, punch: bool = True) -> int:  # noqa: A002
        """Make chunks absent: the records first, then their space. Returns the bytes that were recorded as present.

        Their digests are kept (`digests`). With `punch` the space of all the given chunks is given back, of those
        too that were never recorded. Dropping a whole blob lets `prepare` make a new file.
        """

        def job(txn: Txn) -> tuple[BlobShape, ChunkSet, ChunkSet] | None:
            record = ledger.blob_record(txn, id)
            if record is None:
                return None
            shape = record.blob.shape
            given = ChunkSet(shape.chunk_count, chunks)
            bits = ledger.load_bits(txn, id, shape)
            dropped = ledger.drop(txn, record, bits, given)
            ledger.put_bits(txn, id, bits)
            return shape, given, dropped

        with self._changes:
            outcome = self._index.write(job)
            if outcome is None:
                return 0
            shape, given, dropped = outcome
            if given.full:
                self._files.forget(id)
            if punch:
                evicting.give_back(self._files, id, shape, given)
            self._recorder.dropped(id, given)
        return dropped.byte_count(shape)

    def evict(self, id: BlobId, chunks: Iterable[int] | None = None) -> int | None:  # noqa: A002
        """Drop chunks and give their space back; None: all of them, with the file, of which `prepare` makes a new one.

        Digests are kept. Returns the bytes that were freed on the disk. None if the space stays as it is, though the
        chunks are dropped: the blob was whole once, and may be mapped (so it may go whole only), or the filesystem
        cannot free parts of a file.
        """
        with self._changes, self._preparing:
            if chunks is None:
                known = self._index.write(lambda txn: evicting.take_whole(txn, id))
                return self._finish_deletion(id) if known else 0
            given = list(chunks)
            freed = evicting.evict_part(self._index, self._files, id, given)
            self._recorder.dropped(id, given)
            return freed

    def note_uses(self, times: Mapping[BlobId, Sequence[int]]) -> None:
        """Record when the regions of these blobs were last used (`core.uses`), in one synced transaction."""
        self._index.write(lambda txn: evicting.note_times(txn, times))

    def occupancy(self, id: BlobId) -> tuple[int, int]:  # noqa: A002
        """Bytes that the blob's file takes on the disk, and when it was last written (since 1970); zeros: no file."""
        found = self._files.status(id)
        return (0, 0) if found is None else (found.st_blocks * 512, int(found.st_mtime))

    # The whole

    def usage(self) -> tuple[int, int]:
        """Bytes recorded as present, and bytes that the data files occupy."""
        recorded = occupied = 0
        with self._index.read() as txn:
            for record in ledger.blob_records(txn):
                bits = ledger.load_bits(txn, record.blob.id, record.blob.shape)
                recorded += bits.present.byte_count(record.blob.shape)
                found = self._files.status(record.blob.id)
                occupied += found.st_blocks * 512 if found is not None else 0
        return recorded, occupied

    def free_bytes(self) -> int:
        """Bytes that this user may still write to the cache's filesystem."""
        with disk_errors(f"look at the filesystem of {self.root}"):
            space = os.statvfs(self.root)
        return space.f_bavail * space.f_frsize

    def trial(self) -> None:
        """Write a little, sync it and read it back, as a file and in the index. CacheError says what went wrong."""
        trial.write_and_read(self.root)
        self._index.trial()

    def check(self, *, deep: bool = False) -> list[str]:
        """Sentences about everything in which index, bitmaps and files disagree; `deep` hashes every chunk."""
        from weightfs.store.checking import check

        return check(self._index, self._files, self.epoch, deep=deep)

    def _record(self, txn: Txn, blob: BlobId) -> BlobRecord:
        record = ledger.blob_record(txn, blob)
        if record is None:
            raise CacheError(f"the cache {self.root} knows no blob {blob}: add its ref again")
        return record

"""Landing: what was written to a blob's file becomes what is recorded of it.

Rules that hold here:

- Bytes are in the file, the file is synced, and then the records are committed. Never the other way round.
- A sync says once that bytes may be lost. So after a failed one no chunk that was unrecorded then is recorded, until it
  was dropped, or the doubt was forgiven: what is written after that is synced anew.

Nothing is locked here: all but `doubt` and `forgive`, which are one step in memory, are called one at a time, under the
lock of the cache's changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.errors import CacheError, DiskFault, WeightfsError
from weightfs.store import evicting, ledger
from weightfs.store.index import Index, Txn
from weightfs.store.ledger import Landing
from weightfs.store.records import RunState
from weightfs.store.sparse import SparseFiles

log = logging.getLogger(__name__)

SYNCS_AT_ONCE = 8


class Recorder:
    """One per open cache; `epoch` is what it writes into the records."""

    def __init__(self, index: Index, files: SparseFiles, epoch: int) -> None:
        self._index = index
        self._files = files
        self._epoch = epoch
        # Chunks whose bytes a failed sync may have lost: not to be recorded until they were dropped and came again.
        self._lost: dict[BlobId, ChunkSet] = {}

    def commit(
        self,
        landings: Sequence[Landing],
        runs: Mapping[BlobId, RunState],
        trusts: Mapping[BlobId, Trust],
        rehashed: Mapping[BlobId, ChunkSet],
        now: int,
    ) -> None:
        """Sync and record, as `Cache.commit` says."""
        failed = self._sync(landings)
        conflicts = self._index.write(
            lambda txn: self._record_all(
                txn, [landing for landing in landings if landing.blob not in failed],
                {blob: run for blob, run in runs.items() if blob not in failed}, trusts, rehashed, now,
            )
        )  # fmt: skip
        for error in [*failed.values(), *conflicts]:
            raise error

    def doubt(self, blob: BlobId) -> object | None:
        """A token of the last failed sync of the blob's file: nothing written before it is recorded."""
        return self._lost.get(blob)

    def forgive(self, blob: BlobId, doubt: object) -> None:
        """Record what lands from now on, unless another sync than that of `doubt` has failed since."""
        if self._lost.get(blob) is doubt:
            self._lost.pop(blob, None)

    def dropped(self, blob: BlobId, chunks: Iterable[int]) -> None:
        """These chunks were dropped: what comes there again is written after the sync that failed."""
        lost = self._lost.get(blob)
        if lost is not None:
            lost.difference(ChunkSet(lost.count, chunks))

    def deleted(self, blob: BlobId) -> None:
        """The blob's file is gone, and nothing of it is in doubt any more."""
        self._lost.pop(blob, None)

    def renew(self, blob: BlobId, shape: BlobShape) -> None:
        """Have kernel and filesystem forget what they hold of chunks that are not recorded: `Cache.renew` says why."""
        with self._index.read() as txn:
            present = ledger.load_bits(txn, blob, shape).present
            whole = evicting.load_use(txn, blob).whole
        absent = ChunkSet(shape.chunk_count, range(shape.chunk_count))
        absent.difference(present)
        # Of a file that somebody may have mapped: no holes. Pages that he has mapped stay, all others go.
        punched = not whole and evicting.give_back(self._files, blob, shape, absent)
        self._settle(blob)
        if not punched:
            self._files.forget_pages(blob, ByteSpan(0, shape.size))

    def _settle(self, blob: BlobId) -> None:
        """Sync, past what the kernel has still to tell of bytes that it lost earlier: none of them is recorded."""
        try:
            self._files.sync(blob)
        except DiskFault as error:
            log.debug("it is synced again, for this may be of earlier: %s", error)
            self._files.sync(blob)

    def _sync(self, landings: Sequence[Landing]) -> dict[BlobId, CacheError]:
        """Sync the files of the landings' blobs; returns the blobs that failed."""
        failed: dict[BlobId, CacheError] = {}
        # Of the blobs to be synced: what else than the landings is recorded as present.
        written: dict[BlobId, ChunkSet] = {}
        by_blob = _by_blob(landings)
        for blob, mine in by_blob.items():
            with self._index.read() as txn:
                record = ledger.blob_record(txn, blob)
                if record is None:
                    continue
                present = ledger.load_bits(txn, blob, record.blob.shape).present
            for landing in mine:
                record.blob.shape.span_of(landing.chunk)  # IndexError: the caller's mistake
            lost = self._lost.get(blob)
            if lost is not None and any(landing.chunk in lost for landing in mine):
                failed[blob] = DiskFault(
                    f"chunks of blob {blob} landed before its file failed, and are not recorded: fetch them again",
                    blob=str(blob),
                )
                continue
            present.difference(ChunkSet(present.count, (landing.chunk for landing in mine)))
            written[blob] = present
        for blob, error in self._sync_files(list(written)):
            failed[blob] = error
            unrecorded = ChunkSet(written[blob].count, range(written[blob].count))
            unrecorded.difference(written[blob])
            self._lost[blob] = unrecorded
        return failed

    def _sync_files(self, blobs: Sequence[BlobId]) -> list[tuple[BlobId, CacheError]]:
        """Sync side by side: the filesystem's journal takes many small files in the time of one."""

        def sync(blob: BlobId) -> CacheError | None:
            try:
                self._files.sync(blob)
            except CacheError as error:
                return error
            return None

        if len(blobs) < 2:
            outcomes = [sync(blob) for blob in blobs]
        else:
            with ThreadPoolExecutor(min(SYNCS_AT_ONCE, len(blobs)), "sync") as pool:
                outcomes = list(pool.map(sync, blobs))
        return [(blob, error) for blob, error in zip(blobs, outcomes, strict=True) if error is not None]

    def _record_all(
        self,
        txn: Txn,
        landings: Sequence[Landing],
        runs: Mapping[BlobId, RunState],
        trusts: Mapping[BlobId, Trust],
        rehashed: Mapping[BlobId, ChunkSet],
        now: int,
    ) -> list[WeightfsError]:
        conflicts: list[WeightfsError] = []
        by_blob = _by_blob(landings)
        for blob in dict.fromkeys([*by_blob, *runs, *trusts, *rehashed]):
            record = ledger.blob_record(txn, blob)
            if record is None:
                log.debug("blob %s was deleted before its landings were committed", blob)
                continue
            shape = record.blob.shape
            bits = ledger.load_bits(txn, blob, shape)
            if blob in rehashed:
                ledger.confirm(txn, blob, shape, bits, rehashed[blob], epoch=self._epoch)
            conflicts += ledger.land(txn, record, bits, by_blob.get(blob, ()), epoch=self._epoch, now=now)
            if blob in runs:
                ledger.put_run(txn, record, bits, runs[blob])
            ledger.put_bits(txn, blob, bits)
            evicting.mark_if_whole(txn, blob, bits.present)
            if blob in trusts:
                ledger.set_trust(txn, record, trusts[blob])
        return conflicts


def _by_blob(landings: Iterable[Landing]) -> dict[BlobId, list[Landing]]:
    found: dict[BlobId, list[Landing]] = {}
    for landing in landings:
        found.setdefault(landing.blob, []).append(landing)
    return found

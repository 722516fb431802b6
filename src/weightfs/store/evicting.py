"""Taking blobs, or parts of them, out of the cache; and what is recorded about their last use.

Rules that hold here:

- A blob of which every chunk was recorded at one time may have been passed through to readers by the kernel, who may
  have its file mapped for longer than anybody knows (docs/design.md, "Passthrough"). It is marked `whole` in the very
  transaction that records its last chunk, so before anybody can be passed through; from then on its file is never
  punched: it goes as one, by losing its name, and the mark goes with it.
- Records first, then the space, as for every drop. A file that is to lose its name is noted as doomed in the
  transaction that drops its records, so that a stop in between leaves nothing that takes room for ever.
- Digests stay (see `ledger`): what was proven binds what lands there later.
- A use that cannot be read counts as: whole, and used when its file was last written.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError
from weightfs.store import ledger
from weightfs.store.index import Index, Txn
from weightfs.store.records import RecordError
from weightfs.store.sparse import SparseFiles

log = logging.getLogger(__name__)

_HEAD = struct.Struct(">BB")  # 1: was whole; how many times follow
_TIME = struct.Struct(">I")
MAX_TIMES = 255


@dataclass(frozen=True, slots=True)
class Use:
    """`times`: seconds since 1970 of the last use of each region (`core.uses`); empty where nothing was noted yet."""

    whole: bool = False
    times: tuple[int, ...] = ()


def load_use(txn: Txn, blob: BlobId) -> Use:
    """What is recorded; the careful answer where that is damaged."""
    try:
        payload = txn.get_sealed("use", blob.raw)
        return Use() if payload is None else _decode(payload)
    except RecordError:
        return Use(whole=True)


def put_use(txn: Txn, blob: BlobId, use: Use) -> None:
    """Write it. ValueError: too many regions."""
    txn.put_sealed("use", blob.raw, _encode(use))


def note_times(txn: Txn, times: Mapping[BlobId, Sequence[int]]) -> None:
    """The last uses of some blobs; what is said of one that is unknown is ignored."""
    for blob, mine in times.items():
        if ledger.blob_record(txn, blob) is not None:
            put_use(txn, blob, replace(load_use(txn, blob), times=tuple(mine)))


def mark_if_whole(txn: Txn, blob: BlobId, present: ChunkSet) -> None:
    """Every chunk is recorded: from now on it goes as a whole."""
    if present.full and present.count and not (use := load_use(txn, blob)).whole:
        put_use(txn, blob, replace(use, whole=True))


def evict_part(index: Index, files: SparseFiles, blob: BlobId, chunks: list[int]) -> int | None:
    """Drop chunks of a blob, and give their space back where that may be. See `Cache.evict`."""

    def job(txn: Txn) -> tuple[BlobShape, ChunkSet, bool] | None:
        record = ledger.blob_record(txn, blob)
        if record is None:
            return None
        given = ChunkSet(record.blob.shape.chunk_count, chunks)
        bits = ledger.load_bits(txn, blob, record.blob.shape)
        ledger.drop(txn, record, bits, given)
        ledger.put_bits(txn, blob, bits)
        return record.blob.shape, given, load_use(txn, blob).whole

    outcome = index.write(job)
    if outcome is None:
        return 0
    shape, given, whole = outcome
    before = _occupied(files, blob)
    if whole or not give_back(files, blob, shape, given):
        return None
    return max(0, before - _occupied(files, blob))


def give_back(files: SparseFiles, blob: BlobId, shape: BlobShape, chunks: ChunkSet) -> bool:
    """Punch holes; False if it was not done. No error: the chunks are absent already, whatever is with the file."""
    try:
        freed = files.punch(blob, [shape.bytes_of(run) for run in chunks.runs()])
    except CacheError as error:
        log.warning("dropped chunks of blob %s keep their space: %s", blob, error)
        return False
    if not freed:
        log.info("the filesystem of %s cannot free parts of a file: chunks keep their space", files.directory)
    return freed


def take_whole(txn: Txn, blob: BlobId) -> bool:
    """Drop every chunk, and note that the file is to go. Whether the blob is known."""
    record = ledger.blob_record(txn, blob)
    if record is None:
        return False
    bits = ledger.load_bits(txn, blob, record.blob.shape)
    ledger.drop(txn, record, bits, record.blob.shape.chunks)
    ledger.put_bits(txn, blob, bits)
    put_use(txn, blob, replace(load_use(txn, blob), whole=False))
    txn.put_sealed("doomed", blob.raw, b"")
    return True


def settle_doomed(index: Index) -> list[BlobId]:
    """The blobs whose file is still to be deleted. One in which chunks landed since is not: its note is taken out."""

    def job(txn: Txn) -> list[BlobId]:
        lost = []
        for blob in [BlobId(key) for key in txn.keys("doomed") if len(key) == 16]:
            record = ledger.blob_record(txn, blob)
            if record is None or not len(ledger.load_bits(txn, blob, record.blob.shape).present):
                lost.append(blob)
            else:
                txn.delete("doomed", blob.raw)
        return lost

    with index.read() as txn:
        if not txn.keys("doomed"):
            return []
    return index.write(job)


def _occupied(files: SparseFiles, blob: BlobId) -> int:
    found = files.status(blob)
    return 0 if found is None else found.st_blocks * 512


def _encode(use: Use) -> bytes:
    if len(use.times) > MAX_TIMES:
        raise ValueError(f"a blob has {len(use.times)} regions, and {MAX_TIMES} can be kept")
    times = (min(max(0, int(time)), 0xFFFF_FFFF) for time in use.times)
    return _HEAD.pack(use.whole, len(use.times)) + b"".join(_TIME.pack(time) for time in times)


def _decode(payload: bytes) -> Use:
    if len(payload) < _HEAD.size or len(payload) != _HEAD.size + payload[1] * _TIME.size or payload[0] > 1:
        raise RecordError("the record of a blob's last use is malformed")
    times = tuple(time for (time,) in _TIME.iter_unpack(payload[_HEAD.size :]))
    return Use(bool(payload[0]), times)

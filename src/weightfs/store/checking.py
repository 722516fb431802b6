"""Does the index agree with itself and with the files? Every finding is a sentence; nothing is changed."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator

from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError
from weightfs.store import ledger
from weightfs.store.index import Index, Txn
from weightfs.store.records import (
    BlobRecord,
    ChunkRecord,
    RecordError,
    chunk_of_key,
    decode_bits,
    decode_chunk,
    decode_ref,
    decode_run,
    unseal,
)
from weightfs.store.sparse import SparseFiles

_MANY = 20  # findings of one kind for one blob, before the rest is counted


def check(index: Index, files: SparseFiles, epoch: int, *, deep: bool) -> list[str]:
    """See `Cache.check`."""
    with index.read() as txn:
        records, found = _blobs(txn)
        known = set(records)
        found += _refs(txn, known)
        found += _strangers(txn, files, known)
    for blob, record in sorted(records.items()):
        with index.read() as txn:  # one short snapshot per blob, so that an index in use can grow meanwhile
            chunks, findings = _chunks(txn, record)
            found += _few(blob, findings)
            found += _few(blob, _bits(txn, record, chunks, epoch))
            found += _few(blob, _others(txn, record, chunks))
        present = {chunk: known for chunk, known in chunks.items() if known.present}
        findings = list(_file(files, record, present))
        found += _few(blob, findings)
        if deep and not findings:
            found += _few(blob, _hashes(index, files, record, present))
    if deep:
        found += index.verify()
    return found


def _few(blob: BlobId, findings: Iterator[str] | list[str]) -> list[str]:
    texts = [f"blob {blob}: {text}" for text in findings]
    more = [f"blob {blob}: and {len(texts) - _MANY} more like the last"] if len(texts) > _MANY else []
    return texts[:_MANY] + more


def _blobs(txn: Txn) -> tuple[dict[BlobId, BlobRecord], list[str]]:
    records: dict[BlobId, BlobRecord] = {}
    found: list[str] = []
    for key in txn.keys("blob"):
        try:
            record = ledger.blob_record(txn, BlobId(key))
        except ValueError as error:
            found.append(f"blob {key.hex()}: {error}")
        else:
            if record is not None:
                records[record.blob.id] = record
    return records, found


def _refs(txn: Txn, known: set[BlobId]) -> Iterator[str]:
    for key, value in txn.scan("ref"):
        try:
            record = decode_ref(unseal("ref", key, value))
        except RecordError as error:
            yield f"ref {key.hex()}: {error}"
            continue
        for entry in record.entries:
            if entry.blob not in known:
                yield f"ref {record.ref}: {entry.path} names blob {entry.blob}, which is not recorded"
        try:
            txn.get_sealed("raw", key)
        except RecordError as error:
            yield f"ref {record.ref}: {error}"
    refs = set(txn.keys("ref"))
    for key in txn.keys("raw"):
        if key not in refs:
            yield f"the table raw has an entry for ref {key.hex()}, which is not recorded"


def _strangers(txn: Txn, files: SparseFiles, known: set[BlobId]) -> Iterator[str]:
    raw = {blob.raw for blob in known}
    for table in ("list", "bits", "run", "file"):
        for key in txn.keys(table):
            if key not in raw:
                yield f"the table {table} has an entry for blob {key.hex()}, which is not recorded"
    for prefix in sorted({key[:16] for key in txn.keys("chunk")} - raw):
        yield f"chunks are recorded of blob {prefix.hex()}, which is not recorded itself"
    names = {str(blob) for blob in known} | {key.hex() for key in txn.keys("doomed")}
    for name in files.present():
        if name not in names:
            yield f"the file {files.directory / name} belongs to no blob in the index: remove it to free its space"


def _chunks(txn: Txn, record: BlobRecord) -> tuple[dict[int, ChunkRecord], list[str]]:
    chunks: dict[int, ChunkRecord] = {}
    found: list[str] = []
    shape = record.blob.shape
    for key, value in txn.scan("chunk", record.blob.id.raw):
        chunk = chunk_of_key(key, shape)
        known = None if chunk is None else decode_chunk(value, len(shape.span_of(chunk)))
        if chunk is None:
            found.append("a chunk record has an offset at which no chunk starts")
        elif known is None:
            found.append(f"the record of chunk {chunk} is malformed")
        else:
            chunks[chunk] = known
    return chunks, found


def _bits(txn: Txn, record: BlobRecord, chunks: dict[int, ChunkRecord], epoch: int) -> Iterator[str]:
    try:
        payload = txn.get_sealed("bits", record.blob.id.raw)
        present, suspect = decode_bits(payload or b"", record.blob.shape.chunk_count)
    except RecordError as error:
        yield f"{error}; the chunk records are used instead"
        return
    for chunk in record.blob.shape.chunks:
        recorded = chunk in chunks and chunks[chunk].present
        if recorded is not (chunk in present):
            yield f"chunk {chunk} is {'present' if recorded else 'absent'} by its record, but not by the bitmap"
        if chunk in suspect and chunk not in present:
            yield f"chunk {chunk} is suspect, but not present"
        if recorded and chunk not in suspect and chunks[chunk].epoch != epoch:
            yield f"chunk {chunk} was last hashed in epoch {chunks[chunk].epoch}, but is not suspect in epoch {epoch}"


def _others(txn: Txn, record: BlobRecord, chunks: dict[int, ChunkRecord]) -> Iterator[str]:
    raw, count = record.blob.id.raw, record.blob.shape.chunk_count
    try:
        ledger.whole_blob(txn, record)
    except RecordError as error:
        yield str(error)
    try:
        payload = txn.get_sealed("run", raw)
        run = None if payload is None else decode_run(payload, count)
    except RecordError as error:
        yield str(error)
        return
    if run is not None and any(chunk not in chunks for chunk in range(run.frontier)):
        yield "its running hash is over chunks that are not recorded"


def _file(files: SparseFiles, record: BlobRecord, present: dict[int, ChunkRecord]) -> Iterator[str]:
    found = files.status(record.blob.id)
    if found is None:
        if present:
            yield f"its file is gone, with {len(present)} recorded chunks"
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        yield "its file is not a regular file with one name"
    elif found.st_size != record.blob.size and (present or found.st_size > record.blob.size):
        yield f"its file has {found.st_size} bytes instead of {record.blob.size}"


def _hashes(
    index: Index, files: SparseFiles, record: BlobRecord, present: dict[int, ChunkRecord]
) -> Iterator[str]:
    for chunk, known in present.items():
        try:
            data = files.read(record.blob.id, record.blob.shape.span_of(chunk))
        except CacheError as error:
            yield str(error)
            return
        if hashlib.sha256(data).digest() == known.digest:
            continue
        with index.read() as txn:  # dropped or landed anew while we read?
            again = ledger.chunk_record(txn, record.blob.id, record.blob.shape, chunk)
        if again == known:
            yield f"the disk returned other bytes of chunk {chunk} than were received"

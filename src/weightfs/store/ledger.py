"""What is recorded about blobs and chunks: every change is a function of one index transaction.

Rules that hold here:

- A chunk is present if, and only if, its record says so; bitmap and record change in one transaction.
- Dropping a chunk keeps its digest. A digest on a trusted list, or proven by the whole digest, binds whatever lands
  there later.
- A running hash is kept only while every chunk that it has eaten is present with the digest that it had then, or is
  bound by a trusted list: else other bytes than it has eaten could land below its frontier, and be called verified.
- A blob is verified only while every hole in it is bound: by a trusted list, or by a digest that was proven.
- A verdict of the whole digest outranks a list; a trusted list outranks what came over the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import Blob, BlobId, Trust
from weightfs.errors import IntegrityError
from weightfs.store.index import Txn
from weightfs.store.records import (
    BlobRecord,
    ChunkRecord,
    ChunkState,
    RecordError,
    RefRecord,
    RunState,
    chunk_key,
    chunk_of_key,
    decode_bits,
    decode_blob,
    decode_chunk,
    decode_list,
    decode_ref,
    decode_run,
    encode_bits,
    encode_blob,
    encode_chunk,
    encode_run,
    unseal,
)


@dataclass(frozen=True, slots=True)
class Landing:
    """One chunk whose bytes are in the data file. `digest` is of the wire's bytes; `source` is a number below 256."""

    blob: BlobId
    chunk: int
    digest: bytes
    state: ChunkState
    source: int


@dataclass(slots=True)
class Bits:
    """Which chunks are present, and which of those must be hashed once more before they are trusted."""

    present: ChunkSet
    suspect: ChunkSet


# Blobs and refs


def blob_record(txn: Txn, blob: BlobId) -> BlobRecord | None:
    """The blob without its list's digests. RecordError."""
    payload = txn.get_sealed("blob", blob.raw)
    return None if payload is None else decode_blob(blob, payload)


def blob_records(txn: Txn) -> Iterator[BlobRecord]:
    """Every blob. RecordError."""
    for key in txn.keys("blob"):
        record = blob_record(txn, blob_id(key))
        if record is not None:
            yield record


def whole_blob(txn: Txn, record: BlobRecord) -> Blob:
    """The blob with its chunk list. RecordError."""
    if record.list_trusted is None:
        return record.blob
    digests = txn.get_sealed("list", record.blob.id.raw)
    return replace(record.blob, chunk_list=decode_list(record, digests or b""))


def put_blob_record(txn: Txn, record: BlobRecord) -> None:
    """Write it; the list's digests are written apart."""
    txn.put_sealed("blob", record.blob.id.raw, encode_blob(record))


def ref_records(txn: Txn) -> Iterator[RefRecord]:
    """Every ref. RecordError."""
    for key, value in txn.scan("ref"):
        yield decode_ref(unseal("ref", key, value))


def forget_blob(txn: Txn, blob: BlobId) -> None:
    """Every record of a blob."""
    for table in ("blob", "list", "bits", "run", "use", "file"):
        txn.delete(table, blob.raw)
    forget_chunks(txn, blob)


def forget_chunks(txn: Txn, blob: BlobId) -> None:
    """Every chunk record of a blob, digests included."""
    for key in [key for key, _ in txn.scan("chunk", blob.raw)]:
        txn.delete("chunk", key)


# Chunks


def chunk_records(
    txn: Txn, blob: BlobId, shape: BlobShape, span: ChunkSpan
) -> Iterator[tuple[int, ChunkRecord]]:
    """The readable records of the chunks in `span`, ascending."""
    start = chunk_key(blob, span.start * shape.chunk_length)
    for key, value in txn.scan("chunk", blob.raw, start):
        chunk = chunk_of_key(key, shape)
        if chunk is None:
            continue
        if chunk >= span.stop:
            return
        record = decode_chunk(value, len(shape.span_of(chunk)))
        if record is not None:
            yield chunk, record


def chunk_record(txn: Txn, blob: BlobId, shape: BlobShape, chunk: int) -> ChunkRecord | None:
    """One record; None if there is none that can be read."""
    span = shape.span_of(chunk)
    return decode_chunk(txn.get("chunk", chunk_key(blob, span.start)), len(span))


def put_chunk(txn: Txn, blob: BlobId, shape: BlobShape, chunk: int, record: ChunkRecord) -> None:
    """Write one record."""
    txn.put("chunk", chunk_key(blob, chunk * shape.chunk_length), encode_chunk(record))


def load_bits(txn: Txn, blob: BlobId, shape: BlobShape) -> Bits:
    """The bitmaps; made from the records, and everything suspect, where they are missing or damaged."""
    try:
        payload = txn.get_sealed("bits", blob.raw)
        if payload is not None:
            return Bits(*decode_bits(payload, shape.chunk_count))
    except RecordError:
        pass  # the records are the truth, and say it again
    present = ChunkSet(
        shape.chunk_count,
        (chunk for chunk, record in chunk_records(txn, blob, shape, shape.chunks) if record.present),
    )
    return Bits(present, present.copy())


def put_bits(txn: Txn, blob: BlobId, bits: Bits) -> None:
    """Write the bitmaps."""
    txn.put_sealed("bits", blob.raw, encode_bits(bits.present, bits.suspect))


def load_run(txn: Txn, blob: BlobId, shape: BlobShape) -> RunState | None:
    """The running hash; None where there is none that can be read: it is only a short cut."""
    try:
        payload = txn.get_sealed("run", blob.raw)
        return None if payload is None else decode_run(payload, shape.chunk_count)
    except RecordError:
        return None


def required_digests(txn: Txn, record: BlobRecord, chunks: Iterable[int]) -> dict[int, bytes]:
    """What these chunks must hash to: their entry on a trusted list, or their proven digest. RecordError."""
    listed = whole_blob(txn, record).chunk_list if record.list_trusted else None
    required: dict[int, bytes] = {}
    for chunk in chunks:
        if listed is not None:
            required[chunk] = listed.digest_of(chunk)
            continue
        known = chunk_record(txn, record.blob.id, record.blob.shape, chunk)
        if known is not None and known.state is ChunkState.PROVEN:
            required[chunk] = known.digest
    return required


def land(
    txn: Txn, record: BlobRecord, bits: Bits, landings: Iterable[Landing], *, epoch: int, now: int
) -> list[IntegrityError]:
    """Record landings. One that contradicts a binding digest is left out, and returned as an error."""
    blob, shape = record.blob.id, record.blob.shape
    landings = list(landings)
    required = required_digests(txn, record, {landing.chunk for landing in landings})
    run = load_run(txn, blob, shape)
    conflicts: list[IntegrityError] = []
    for landing in landings:
        chunk, state = landing.chunk, landing.state
        old = chunk_record(txn, blob, shape, chunk)
        if state is not ChunkState.DISK_BAD and required.get(chunk, landing.digest) != landing.digest:
            conflicts.append(
                IntegrityError(
                    f"chunk {chunk} of blob {blob} was not recorded: it differs from the digest that binds it"
                )
            )
            continue
        same = old is not None and old.digest == landing.digest and state is not ChunkState.DISK_BAD
        if run is not None and run.frontier > chunk and not same:
            txn.delete("run", blob.raw)
            run = None
        if chunk not in required:
            record = _unprove(txn, record)
        state = _state_of(state, old, landing.digest, listed=bool(record.list_trusted))
        length = len(shape.span_of(chunk))
        fresh = ChunkRecord(state, landing.source, epoch, length, landing.digest, now)
        put_chunk(txn, blob, shape, chunk, fresh)
        if fresh.present:
            bits.present.add(chunk)
        else:
            bits.present.discard(chunk)
        bits.suspect.discard(chunk)
    return conflicts


def _state_of(state: ChunkState, old: ChunkRecord | None, digest: bytes, *, listed: bool) -> ChunkState:
    if state is ChunkState.DISK_BAD:
        return state
    if old is not None and old.state is ChunkState.PROVEN and old.digest == digest:
        return ChunkState.PROVEN
    if state in (ChunkState.LANDED, ChunkState.LISTED):
        return ChunkState.LISTED if listed else ChunkState.LANDED
    return state


def drop(txn: Txn, record: BlobRecord, bits: Bits, chunks: Iterable[int]) -> ChunkSet:
    """Make chunks absent, keep their digests. Returns those that were present.

    What was concluded from their bytes goes in the same transaction, unless a digest binds what will land there.
    """
    blob, shape = record.blob.id, record.blob.shape
    dropped = ChunkSet(shape.chunk_count)
    proven = True
    for chunk in chunks:
        if chunk not in bits.present:
            continue
        dropped.add(chunk)
        old = chunk_record(txn, blob, shape, chunk)
        proven = proven and old is not None and old.state is ChunkState.PROVEN
        if old is None:  # a bit without a readable record: nothing to keep
            txn.delete("chunk", chunk_key(blob, chunk * shape.chunk_length))
        else:
            put_chunk(txn, blob, shape, chunk, replace(old, absent=True))
    bits.present.difference(dropped)
    bits.suspect.difference(dropped)
    if not record.list_trusted:
        run = load_run(txn, blob, shape)
        if run is not None and any(chunk < run.frontier for chunk in dropped):
            txn.delete("run", blob.raw)
        if not proven:
            _unprove(txn, record)
    return dropped


def _unprove(txn: Txn, record: BlobRecord) -> BlobRecord:
    """Take a verdict back: bytes that nothing binds may come into the blob."""
    if record.trust is not Trust.VERIFIED:
        return record
    changed = replace(record, trust=record.initial_trust)
    put_blob_record(txn, changed)
    return changed


def confirm(txn: Txn, blob: BlobId, shape: BlobShape, bits: Bits, rehashed: ChunkSet, *, epoch: int) -> None:
    """These present chunks were hashed in this epoch, and are what their records say."""
    for chunk in rehashed:
        record = chunk_record(txn, blob, shape, chunk)
        if chunk not in bits.present or record is None:
            continue
        bits.suspect.discard(chunk)
        if record.epoch != epoch:
            put_chunk(txn, blob, shape, chunk, replace(record, epoch=epoch))


def put_run(txn: Txn, record: BlobRecord, bits: Bits, run: RunState) -> bool:
    """Keep a running hash, if every chunk that it has eaten is still there or bound; else the last one stays."""
    blob, shape = record.blob.id, record.blob.shape
    if run.frontier > shape.chunk_count:
        raise ValueError(f"a running hash over {run.frontier} of {shape.chunk_count} chunks")
    for hole in bits.present.holes(ChunkSpan(0, run.frontier)):
        if not record.list_trusted or any(chunk_record(txn, blob, shape, chunk) is None for chunk in hole):
            return False
    txn.put_sealed("run", blob.raw, encode_run(run))
    return True


def set_trust(txn: Txn, record: BlobRecord, trust: Trust) -> BlobRecord:
    """Record a verdict on the blob, and what it means for its chunks."""
    match trust:
        case Trust.VERIFIED:
            _restate(txn, record.blob, lambda _: ChunkState.PROVEN)
        case Trust.QUARANTINED:
            _restate(txn, record.blob, lambda old: ChunkState.SUSPECT if old is ChunkState.LANDED else old)
        case _:
            pass
    changed = replace(record, trust=trust)
    put_blob_record(txn, changed)
    return changed


def _restate(txn: Txn, blob: Blob, rule: Callable[[ChunkState], ChunkState]) -> None:
    for chunk, record in list(chunk_records(txn, blob.id, blob.shape, blob.shape.chunks)):
        state = rule(record.state)
        if state is not record.state:
            # A chunk that the disk spoilt stays a hole, whatever is known about its digest.
            put_chunk(
                txn, blob.id, blob.shape, chunk, replace(record, state=state, absent=not record.present)
            )


def blob_id(key: bytes) -> BlobId:
    """The blob of a key. RecordError."""
    try:
        return BlobId(key)
    except ValueError as error:
        raise RecordError("the key of a blob has the wrong length") from error

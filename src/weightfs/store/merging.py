"""What happens when a blob that the index knows is added again with other particulars.

Rules, in this order:

- Same id, other size, other digest or another kind of digest: refused (IntegrityError). A digest that was not known
  before is added.
- Another chunk length: the new shape is taken if nothing is present, nothing was proven and nobody uses the old one
  in this session; else the old shape stays, and a new chunk list that does not fit it is left out.
- A trusted list is never replaced by an untrusted or a different one; a list that contradicts a proven chunk is
  not taken.
- A new trusted list is held against the record: equal chunks become LISTED, different ones absent. Their space is
  not given back: a reader who is on his way meets the bytes that were there, and the next landing overwrites them.
- Mirrors and policy are the newest's; where another ref names the blob too, mirrors are joined and the stricter
  policy holds.
- What changes nothing writes nothing: a repository of 100,000 files is added again at every update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from weightfs.core.chunkset import ChunkSet
from weightfs.core.manifest import MAX_MIRRORS, Blob, ChunkList, Mirror, Policy, Trust
from weightfs.errors import ChunkListError, IntegrityError
from weightfs.store import ledger
from weightfs.store.index import Txn
from weightfs.store.ledger import Bits
from weightfs.store.records import BlobRecord, ChunkState

_STRICTNESS = {Policy.PROVISIONAL: 0, Policy.HOLD: 1, Policy.STRICT: 2}


def put_blob(txn: Txn, blob: Blob, *, shared: Callable[[], bool], in_use: bool) -> list[str]:
    """Add a blob, or join it with what is known. Returns sentences about what was not taken over as given.

    `shared()`: whether other refs name it; asked only where that matters. `in_use`: somebody counts on its shape.
    """
    _check_list(blob)
    old = ledger.blob_record(txn, blob.id)
    notes: list[str] = []
    if old is None:
        _write(txn, blob, blob.chunk_list, blob.initial_trust)
        ledger.put_bits(txn, blob.id, Bits(*(ChunkSet(blob.shape.chunk_count) for _ in range(2))))
        return notes
    _check_same(old.blob, blob)
    if old.blob.shape != blob.shape:
        if not in_use and _is_blank(txn, old):
            ledger.forget_blob(txn, blob.id)
            return put_blob(txn, _with_digest(blob, old.blob), shared=lambda: False, in_use=False)
        notes.append(
            f"blob {blob.id} keeps its chunk length of {old.blob.shape.chunk_length} bytes, which is in use; the "
            f"published list in pieces of {blob.shape.chunk_length} bytes takes effect after the model was removed "
            "(`weightfs rm`) and added again"
        )
        blob = replace(blob, shape=old.blob.shape, chunk_list=None)
    known = ledger.whole_blob(txn, old)
    chosen = _choose_list(txn, known, blob.chunk_list, notes)
    trust = old.trust
    if chosen is not None and chosen.trusted and chosen is not known.chunk_list:
        trust = _apply_list(txn, old, chosen, notes)
    mirrors, policy = blob.mirrors, blob.policy
    if (mirrors, policy) != (old.blob.mirrors, old.blob.policy) and shared():
        mirrors = _join(blob.mirrors, old.blob.mirrors)
        policy = max(policy, old.blob.policy, key=_STRICTNESS.__getitem__)
    fresh = _with_digest(replace(blob, mirrors=mirrors, policy=policy), old.blob)
    if chosen is not known.chunk_list or _record_of(fresh, chosen, trust) != old:
        _write(txn, fresh, chosen, trust)
    return notes


def _check_list(blob: Blob) -> None:
    chunks = blob.chunk_list
    if chunks is None:
        return
    if chunks.chunk_length != blob.shape.chunk_length or len(chunks.digests) != 32 * blob.shape.chunk_count:
        raise ChunkListError(f"the chunk list of blob {blob.id} does not fit its {blob.size} bytes")


def _check_same(old: Blob, new: Blob) -> None:
    if old.size != new.size:
        raise IntegrityError(
            f"blob {new.id} has {old.size} bytes in the cache, but {new.size} where it is added from"
        )
    if old.digest and new.digest and old.digest != new.digest:
        raise IntegrityError(f"blob {new.id} has another digest in the cache than where it is added from")


def _with_digest(new: Blob, old: Blob) -> Blob:
    """`new`, with the digest that `old` has if it brings none."""
    return new if new.digest else replace(new, sha256=old.sha256, git_sha1=old.git_sha1)


def _is_blank(txn: Txn, old: BlobRecord) -> bool:
    bits = ledger.load_bits(txn, old.blob.id, old.blob.shape)
    return not len(bits.present) and old.trust not in (Trust.VERIFIED, Trust.QUARANTINED)


def _choose_list(txn: Txn, known: Blob, fresh: ChunkList | None, notes: list[str]) -> ChunkList | None:
    old = known.chunk_list
    if fresh is None or fresh == old:
        return old
    if old is not None and old.trusted:
        if fresh.digests == old.digests:
            return fresh if fresh.trusted else old  # perhaps another signer
        notes.append(f"the new chunk list of blob {known.id} differs from the trusted one, which stays")
        return old
    for chunk, record in ledger.chunk_records(txn, known.id, known.shape, known.shape.chunks):
        if record.state is ChunkState.PROVEN and record.digest != fresh.digest_of(chunk):
            notes.append(
                f"the new chunk list of blob {known.id} is wrong at chunk {chunk}, as the blob's verified SHA-256 "
                "proves; it is not used"
            )
            return old
    return fresh


def _apply_list(txn: Txn, old: BlobRecord, chosen: ChunkList, notes: list[str]) -> Trust:
    """Hold the records against a trusted list; returns the blob's trust after it."""
    blob, shape = old.blob.id, old.blob.shape
    records = list(ledger.chunk_records(txn, blob, shape, shape.chunks))
    wrong = [chunk for chunk, record in records if record.digest != chosen.digest_of(chunk)]
    for chunk, record in records:
        if record.digest == chosen.digest_of(chunk) and record.state in (
            ChunkState.LANDED,
            ChunkState.SUSPECT,
        ):
            ledger.put_chunk(txn, blob, shape, chunk, replace(record, state=ChunkState.LISTED))
    if wrong:
        bits = ledger.load_bits(txn, blob, shape)
        ledger.drop(txn, old, bits, wrong)
        ledger.put_bits(txn, blob, bits)
        txn.delete("run", blob.raw)  # it may have eaten them
        notes.append(
            f"{len(wrong)} cached chunks of blob {blob} differ from its trusted list, and are fetched again"
        )
    if old.trust is Trust.VERIFIED or (old.trust is Trust.QUARANTINED and not wrong):
        return old.trust
    return Trust.ATTESTED


def _join(first: tuple[Mirror, ...], second: tuple[Mirror, ...]) -> tuple[Mirror, ...]:
    urls = {mirror.url for mirror in first}
    return (first + tuple(mirror for mirror in second if mirror.url not in urls))[:MAX_MIRRORS]


def _write(txn: Txn, blob: Blob, chunks: ChunkList | None, trust: Trust) -> None:
    if chunks is None:
        txn.delete("list", blob.id.raw)
    else:
        txn.put_sealed("list", blob.id.raw, chunks.digests)
    ledger.put_blob_record(txn, _record_of(blob, chunks, trust))


def _record_of(blob: Blob, chunks: ChunkList | None, trust: Trust) -> BlobRecord:
    alone = blob if blob.chunk_list is None else replace(blob, chunk_list=None)
    if chunks is None:
        return BlobRecord(alone, trust, None)
    return BlobRecord(alone, trust, chunks.trusted, chunks.signer)

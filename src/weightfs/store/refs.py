"""Refs in the index: what each is pinned to, and what it was pinned to before."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from weightfs.core.manifest import Blob, BlobId, Manifest, check_path
from weightfs.errors import IntegrityError
from weightfs.store import ledger, merging
from weightfs.store.index import Txn
from weightfs.store.records import (
    MAX_PREVIOUS,
    RecordError,
    RefRecord,
    decode_ref,
    encode_ref,
    manifest_of,
    ref_key,
)


@dataclass(frozen=True, slots=True)
class StoredRef:
    """A ref as it was pinned. `added_at` is in Unix seconds; `previous` are earlier revisions, the latest first."""

    manifest: Manifest
    added_at: int
    previous: tuple[str, ...]


def every(txn: Txn) -> list[StoredRef]:
    """Every ref, ordered by its text. RecordError."""
    blobs: dict[BlobId, Blob] = {}
    found = [
        StoredRef(
            manifest_of(record, [_entry_blob(txn, blob, blobs) for _, blob in record.entries]),
            record.added_at,
            record.previous,
        )
        for record in ledger.ref_records(txn)
    ]
    return sorted(found, key=lambda stored: stored.manifest.ref)


def named(txn: Txn) -> set[BlobId]:
    """The blobs that some ref names. RecordError."""
    return {blob for record in ledger.ref_records(txn) for _, blob in record.entries}


def put(txn: Txn, manifest: Manifest, *, in_use: Collection[BlobId], now: int) -> tuple[str, ...]:
    """See `Cache.put_ref`. `in_use`: blobs whose shape somebody counts on in this session."""
    _check(manifest)
    elsewhere = {
        blob for record in ledger.ref_records(txn) if record.ref != manifest.ref for _, blob in record.entries
    }
    notes: list[str] = []
    for entry in manifest.entries:
        blob = entry.blob
        notes += merging.put_blob(txn, blob, shared=blob.id in elsewhere, in_use=blob.id in in_use)
        elsewhere.add(blob.id)  # the same content under two paths has the mirrors of both
        txn.delete("doomed", blob.id.raw)
    key = ref_key(manifest.ref)
    payload = txn.get_sealed("ref", key)
    old = None if payload is None else decode_ref(payload)
    previous = () if old is None else old.previous
    if old is not None and old.revision != manifest.revision:
        previous = (old.revision, *previous)[:MAX_PREVIOUS]
    record = RefRecord(
        ref=manifest.ref,
        revision=manifest.revision,
        tree=manifest.tree,
        entries=tuple((entry.path, entry.blob.id) for entry in manifest.entries),
        added_at=now if old is None else old.added_at,
        previous=previous,
    )
    txn.put_sealed("ref", key, encode_ref(record))
    return tuple(notes)


def remove(txn: Txn, ref: str) -> list[BlobId]:
    """See `Cache.remove_ref`."""
    payload = txn.get_sealed("ref", ref_key(ref))
    if payload is None:
        return []
    txn.delete("ref", ref_key(ref))
    mine = {blob for _, blob in decode_ref(payload).entries}
    return sorted(mine - named(txn))


def _check(manifest: Manifest) -> None:
    """What is read back strictly is not written otherwise."""
    for path in (manifest.tree, *(entry.path for entry in manifest.entries)):
        try:
            check_path(path)
        except ValueError as error:
            raise IntegrityError(f"{manifest.ref} names the path {path[:100]!r}: {error}") from error


def _entry_blob(txn: Txn, blob: BlobId, known: dict[BlobId, Blob]) -> Blob:
    if blob not in known:
        record = ledger.blob_record(txn, blob)
        if record is None:
            raise RecordError(f"a ref names blob {blob}, which is not recorded")
        known[blob] = ledger.whole_blob(txn, record)
    return known[blob]

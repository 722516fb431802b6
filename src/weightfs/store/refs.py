"""Refs in the index: what each is pinned to, and what it was pinned to before.

What the origin said byte for byte (`Manifest.raw`) has a table of its own, so that it is read with the manifests only,
and not wherever somebody asks which blobs are named.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

from weightfs.core.manifest import Blob, BlobId, Manifest, check_path
from weightfs.errors import IntegrityError
from weightfs.store import ledger, merging
from weightfs.store.index import Txn
from weightfs.store.records import (
    MAX_PREVIOUS,
    MAX_RAW,
    EntryRecord,
    RecordError,
    RefRecord,
    decode_ref,
    encode_ref,
    manifest_of,
    ref_key,
)

_PAUSED = b"paused"


@dataclass(frozen=True, slots=True)
class StoredRef:
    """A ref as it is known. `added_at` is in Unix seconds; `previous` are earlier revisions, the latest first.

    `pinned`: it is to be kept whole. `paused`: nothing of it is fetched in the background. `fill`: how much of it is,
    or empty, where nobody said so of this ref.
    """

    manifest: Manifest
    added_at: int
    previous: tuple[str, ...]
    pinned: bool = False
    paused: bool = False
    fill: str = ""


def every(txn: Txn) -> list[StoredRef]:
    """Every ref, ordered by its text. RecordError."""
    blobs: dict[BlobId, Blob] = {}
    found = [_stored(txn, record, blobs) for record in ledger.ref_records(txn)]
    return sorted(found, key=lambda stored: stored.manifest.ref)


def one(txn: Txn, ref: str) -> StoredRef | None:
    """The ref of exactly this text. RecordError."""
    record = _record(txn, ref)
    return None if record is None else _stored(txn, record, {})


def names(txn: Txn) -> list[str]:
    """The texts of all refs, ordered. RecordError."""
    return sorted(record.ref for record in ledger.ref_records(txn))


def named(txn: Txn) -> set[BlobId]:
    """The blobs that some ref names. RecordError."""
    return {entry.blob for record in ledger.ref_records(txn) for entry in record.entries}


def put(txn: Txn, manifest: Manifest, *, in_use: Collection[BlobId], now: int) -> tuple[str, ...]:
    """See `Cache.put_ref`. `in_use`: blobs whose shape somebody counts on in this session."""
    _check(manifest)
    elsewhere = _Elsewhere(txn, manifest.ref)
    notes: list[str] = []
    for entry in manifest.entries:
        blob = entry.blob
        notes += merging.put_blob(
            txn, blob, shared=partial(elsewhere.names, blob.id), in_use=blob.id in in_use
        )
        elsewhere.seen.add(blob.id)  # the same content under two paths has the mirrors of both
        txn.delete("doomed", blob.id.raw)
    old = _record(txn, manifest.ref)
    previous = () if old is None else old.previous
    if old is not None and old.revision != manifest.revision:
        previous = (old.revision, *previous)[:MAX_PREVIOUS]
    record = RefRecord(
        ref=manifest.ref,
        revision=manifest.revision,
        tree=manifest.tree,
        entries=tuple(EntryRecord(entry.path, entry.blob.id, entry.span) for entry in manifest.entries),
        added_at=now if old is None else old.added_at,
        previous=previous,
        pinned=old is not None and old.pinned,
        paused=old is not None and old.paused,
        fill="" if old is None else old.fill,
    )
    key = ref_key(manifest.ref)
    txn.put_sealed("ref", key, encode_ref(record))
    if manifest.raw:
        txn.put_sealed("raw", key, manifest.raw)
    else:
        txn.delete("raw", key)
    return tuple(notes)


class _Elsewhere:
    """Which blobs other refs name. Read at the first question, since it takes the records of all refs."""

    def __init__(self, txn: Txn, ref: str) -> None:
        self._txn = txn
        self._ref = ref
        self._others: frozenset[BlobId] | None = None
        self.seen: set[BlobId] = set()  # and those that this one has named already

    def names(self, blob: BlobId) -> bool:
        """Whether the blob has others. RecordError."""
        if self._others is None:
            others = (record for record in ledger.ref_records(self._txn) if record.ref != self._ref)
            self._others = frozenset(entry.blob for record in others for entry in record.entries)
        return blob in self.seen or blob in self._others


def mark(txn: Txn, ref: str, *, pinned: bool | None, paused: bool | None, fill: str | None) -> bool:
    """See `Cache.mark_ref`."""
    record = _record(txn, ref)
    if record is None:
        return False
    marked = replace(
        record,
        pinned=record.pinned if pinned is None else pinned,
        paused=record.paused if paused is None else paused,
        fill=record.fill if fill is None else fill,
    )
    txn.put_sealed("ref", ref_key(ref), encode_ref(marked))
    return True


def pause_all(txn: Txn, on: bool) -> None:
    """See `Cache.pause`."""
    if on:
        txn.put("meta", _PAUSED, b"")
    else:
        txn.delete("meta", _PAUSED)


def all_paused(txn: Txn) -> bool:
    """See `Cache.paused`."""
    return txn.get("meta", _PAUSED) is not None


def remove(txn: Txn, ref: str) -> list[BlobId]:
    """See `Cache.remove_ref`."""
    record = _record(txn, ref)
    if record is None:
        return []
    for table in ("ref", "raw"):
        txn.delete(table, ref_key(ref))
    return sorted({entry.blob for entry in record.entries} - named(txn))


def _record(txn: Txn, ref: str) -> RefRecord | None:
    payload = txn.get_sealed("ref", ref_key(ref))
    return None if payload is None else decode_ref(payload)


def _stored(txn: Txn, record: RefRecord, known: dict[BlobId, Blob]) -> StoredRef:
    blobs = [_entry_blob(txn, entry.blob, known) for entry in record.entries]
    raw = txn.get_sealed("raw", ref_key(record.ref)) or b""
    return StoredRef(
        manifest_of(record, blobs, raw),
        record.added_at,
        record.previous,
        record.pinned,
        record.paused,
        record.fill,
    )


def _check(manifest: Manifest) -> None:
    """What is read back strictly is not written otherwise."""
    for path in (manifest.tree, *(entry.path for entry in manifest.entries)):
        try:
            check_path(path)
        except ValueError as error:
            raise IntegrityError(f"{manifest.ref} names the path {path[:100]!r}: {error}") from error
    for entry in manifest.entries:
        if entry.blob.sha256 is not None and entry.blob.git_sha1 is not None:
            raise IntegrityError(f"{manifest.ref} gives two kinds of digest for {entry.path}")
        if entry.span is not None and entry.span.stop > entry.blob.size:
            raise IntegrityError(
                f"{manifest.ref} says that {entry.path} goes on after the end of the file that holds it"
            )
    if len(manifest.raw) > MAX_RAW:
        raise IntegrityError(
            f"the manifest or file list of {manifest.ref} has {len(manifest.raw)} bytes, and {MAX_RAW} can be kept: "
            "name fewer of its files"
        )


def _entry_blob(txn: Txn, blob: BlobId, known: dict[BlobId, Blob]) -> Blob:
    if blob not in known:
        record = ledger.blob_record(txn, blob)
        if record is None:
            raise RecordError(f"a ref names blob {blob}, which is not recorded")
        known[blob] = ledger.whole_blob(txn, record)
    return known[blob]

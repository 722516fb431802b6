"""How the index's values are written as bytes, and read back strictly.

Every value but a chunk record ends in eight bytes of BLAKE2b over its table, its key and itself ("sealed"): a value
that was damaged, cut, or put under another key raises `RecordError`. A chunk record needs no seal: it carries the
SHA-256 of the bytes that it speaks about, and one with an impossible field is a hole.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, ChunkList, Entry, Manifest, Mirror, Policy, Trust, check_path

_SEAL = 8
_CHUNK = struct.Struct(">BBHI32sI")  # state, source, epoch, length, SHA-256, landed at
_OFFSET = struct.Struct(">Q")
_RUN = struct.Struct(">Q32s")
_COUNT = struct.Struct(">I")
_FILE = struct.Struct(">QQqq")
_ABSENT = 0x80  # in the state byte
MAX_PREVIOUS = 32  # revisions remembered per ref
# What an origin said may have 16 MiB in a registry; a Hub's list of 300,000 files has about 200 bytes for each.
MAX_RAW = 64 << 20

T = TypeVar("T")


class RecordError(ValueError):
    """A value in the index cannot be what we wrote. Its text says which."""


class ChunkState(IntEnum):
    """What is known about a recorded chunk."""

    LANDED = 1  # hashed from the wire
    LISTED = 2  # and equal to a trusted list
    PROVEN = 3  # part of a blob whose whole digest matched
    DISK_BAD = 4  # the disk returned other bytes than were received: a hole
    SUSPECT = 5  # the bytes are the wire's, but the whole digest did not match


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """What the index knows of one chunk. `absent`: its bytes were dropped, and its digest is kept."""

    state: ChunkState
    source: int
    epoch: int
    length: int
    digest: bytes
    landed_at: int
    absent: bool = False

    @property
    def present(self) -> bool:
        """Whether the data file holds the bytes."""
        return not self.absent and self.state is not ChunkState.DISK_BAD


@dataclass(frozen=True, slots=True)
class RunState:
    """The running SHA-256 over chunks [0, frontier): 8 × u32be intermediate hash value (FIPS 180-4)."""

    frontier: int
    state: bytes


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A blob as the index keeps it: its chunk list's digests are in a table of their own."""

    blob: Blob  # chunk_list is None here, even where `list_trusted` is not
    trust: Trust
    list_trusted: bool | None  # None: no list
    list_signer: str = ""

    @property
    def initial_trust(self) -> Trust:
        """The state before the whole digest was compared."""
        if self.list_trusted:
            return Trust.ATTESTED
        return Trust.PROVISIONAL if self.blob.digest else Trust.UNVERIFIABLE


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """One path of a ref; `span` as in `core.manifest.Entry`."""

    path: str
    blob: BlobId
    span: ByteSpan | None = None


@dataclass(frozen=True, slots=True)
class RefRecord:
    """A ref's manifest, its blobs by id. What its origin said byte for byte is in a table of its own."""

    ref: str
    revision: str
    tree: str
    entries: tuple[EntryRecord, ...]
    added_at: int
    previous: tuple[str, ...]  # earlier revisions, the latest first
    pinned: bool = False  # somebody wants it whole
    paused: bool = False  # nothing of it is to be fetched in the background
    fill: str = ""  # how much of it is, or "": as the mount is configured


@dataclass(frozen=True, slots=True)
class FileMark:
    """How a data file looked when the cache was closed: any later touch shows."""

    size: int
    inode: int
    changed_ns: int
    modified_ns: int


def seal(table: str, key: bytes, payload: bytes) -> bytes:
    """`payload` with its check at the end."""
    return payload + _check(table, key, payload)


def unseal(table: str, key: bytes, value: bytes) -> bytes:
    """The payload of a sealed value. RecordError."""
    payload = value[:-_SEAL]
    if len(value) < _SEAL or _check(table, key, payload) != value[-_SEAL:]:
        raise RecordError(f"a value of the table {table} was damaged")
    return payload


def _check(table: str, key: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(
        len(key).to_bytes(2, "big") + key + payload, digest_size=_SEAL, person=table.encode()
    ).digest()


# Chunks


def chunk_key(blob: BlobId, offset: int) -> bytes:
    """16 bytes of blob id, then the chunk's first byte as u64be."""
    return blob.raw + _OFFSET.pack(offset)


def encode_chunk(record: ChunkRecord) -> bytes:
    """44 bytes."""
    state = record.state | (_ABSENT if record.absent else 0)
    return _CHUNK.pack(state, record.source, record.epoch, record.length, record.digest, record.landed_at)


def decode_chunk(value: bytes | None, length: int) -> ChunkRecord | None:
    """The record, or None where there is none that a chunk of `length` bytes can have."""
    if value is None or len(value) != _CHUNK.size:
        return None
    state, source, epoch, recorded, digest, landed_at = _CHUNK.unpack(value)
    try:
        known = ChunkState(state & ~_ABSENT)
    except ValueError:
        return None
    if recorded != length:
        return None
    return ChunkRecord(known, source, epoch, recorded, digest, landed_at, bool(state & _ABSENT))


def chunk_of_key(key: bytes, shape: BlobShape) -> int | None:
    """The chunk's number, or None if no chunk of that shape starts at the key's offset."""
    if len(key) != 24:
        return None
    chunk, rest = divmod(_OFFSET.unpack_from(key, 16)[0], shape.chunk_length)
    return None if rest or chunk >= shape.chunk_count else chunk


# Bitmaps, running hash, files


def encode_bits(present: ChunkSet, suspect: ChunkSet) -> bytes:
    """u32be count, then the two bitmaps."""
    return _COUNT.pack(present.count) + present.to_bytes() + suspect.to_bytes()


def decode_bits(payload: bytes, count: int) -> tuple[ChunkSet, ChunkSet]:
    """Present and suspect. RecordError."""
    width = -(-count // 8)
    if len(payload) != _COUNT.size + 2 * width or _COUNT.unpack_from(payload)[0] != count:
        raise RecordError("a bitmap has another length than its blob")
    try:
        present = ChunkSet.from_bytes(count, payload[_COUNT.size : _COUNT.size + width])
        suspect = ChunkSet.from_bytes(count, payload[_COUNT.size + width :])
    except ValueError as error:
        raise RecordError(f"a bitmap is malformed: {error}") from error
    return present, suspect


def encode_run(run: RunState) -> bytes:
    """u64be frontier, then the state."""
    return _RUN.pack(run.frontier, run.state)


def decode_run(payload: bytes, count: int) -> RunState:
    """The running hash of a blob with `count` chunks. RecordError."""
    if len(payload) != _RUN.size:
        raise RecordError("a running hash has the wrong length")
    frontier, state = _RUN.unpack(payload)
    if frontier > count:
        raise RecordError("a running hash is ahead of its blob")
    return RunState(frontier, state)


def encode_file(mark: FileMark) -> bytes:
    """Size, inode, ctime and mtime."""
    return _FILE.pack(mark.size, mark.inode, mark.changed_ns, mark.modified_ns)


def decode_file(payload: bytes) -> FileMark:
    """RecordError."""
    if len(payload) != _FILE.size:
        raise RecordError("a file's mark has the wrong length")
    return FileMark(*_FILE.unpack(payload))


# Blobs and refs: JSON, because people look at them when something is wrong. A key that format 1 did not have is
# written only where it says something, and may be missing.


def encode_blob(record: BlobRecord) -> bytes:
    """Everything but the id (the key) and the list's digests."""
    blob = record.blob
    fields: dict[str, object] = {
        "size": blob.size,
        "chunk_length": blob.shape.chunk_length,
        "sha256": None if blob.sha256 is None else blob.sha256.hex(),
        "mirrors": [[mirror.url, mirror.priority, mirror.validator] for mirror in blob.mirrors],
        "policy": blob.policy.value,
        "trust": record.trust.value,
        "list": None if record.list_trusted is None else [record.list_trusted, record.list_signer],
    }
    if blob.git_sha1 is not None:
        fields["git_sha1"] = blob.git_sha1.hex()
    return _dump(fields)


def decode_blob(blob: BlobId, payload: bytes) -> BlobRecord:
    """RecordError."""
    fields = _load(payload, "blob")
    try:
        sha256, git_sha1 = _digest(fields["sha256"], 32), _digest(fields.get("git_sha1"), 20)
        if sha256 is not None and git_sha1 is not None:
            raise ValueError("a blob has one digest of the whole")
        mirrors = tuple(
            Mirror(_typed(url, str), _typed(priority, int), _typed(validator, str))
            for url, priority, validator in _typed(fields["mirrors"], list)
        )
        trusted, signer = (None, "") if fields["list"] is None else fields["list"]
        shape = BlobShape(_typed(fields["size"], int), _typed(fields["chunk_length"], int))
        found = Blob(blob, shape, sha256, mirrors, None, Policy(fields["policy"]), git_sha1)
        return BlobRecord(
            found,
            Trust(fields["trust"]),
            None if trusted is None else _typed(trusted, bool),
            _typed(signer, str),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the record of blob {blob} is malformed: {error}") from error


def decode_list(record: BlobRecord, digests: bytes) -> ChunkList:
    """The chunk list of a blob that has one. RecordError."""
    if len(digests) != 32 * record.blob.shape.chunk_count or record.list_trusted is None:
        raise RecordError(f"the chunk list of blob {record.blob.id} has the wrong length")
    return ChunkList(record.blob.shape.chunk_length, digests, record.list_trusted, record.list_signer)


def ref_key(ref: str) -> bytes:
    """A ref may be longer than LMDB's longest key."""
    return hashlib.sha256(ref.encode()).digest()


def encode_ref(record: RefRecord) -> bytes:
    """JSON."""
    fields: dict[str, object] = {
        "ref": record.ref,
        "revision": record.revision,
        "tree": record.tree,
        "entries": [_encode_entry(entry) for entry in record.entries],
        "added_at": record.added_at,
        "previous": list(record.previous),
    }
    if record.pinned:
        fields["pinned"] = True
    if record.paused:
        fields["paused"] = True
    if record.fill:
        fields["fill"] = record.fill
    return _dump(fields)


def _encode_entry(entry: EntryRecord) -> list[object]:
    span = () if entry.span is None else (entry.span.start, entry.span.stop)  # an empty one is falsy
    return [entry.path, str(entry.blob), *span]


def decode_ref(payload: bytes) -> RefRecord:
    """RecordError."""
    fields = _load(payload, "ref")
    try:
        return RefRecord(
            ref=_typed(fields["ref"], str),
            revision=_typed(fields["revision"], str),
            tree=check_path(_typed(fields["tree"], str)),
            entries=tuple(_decode_entry(*entry) for entry in _typed(fields["entries"], list)),
            added_at=_typed(fields["added_at"], int),
            previous=tuple(_typed(revision, str) for revision in _typed(fields["previous"], list)),
            pinned=_typed(fields.get("pinned", False), bool),
            paused=_typed(fields.get("paused", False), bool),
            fill=_typed(fields.get("fill", ""), str),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the record of a ref is malformed: {error}") from error


def _decode_entry(path: object, blob: object, *span: object) -> EntryRecord:
    if len(span) not in (0, 2):
        raise ValueError("an entry's span has two ends")
    bounds = [_typed(end, int) for end in span]
    return EntryRecord(
        check_path(_typed(path, str)),
        BlobId.from_hex(_typed(blob, str)),
        ByteSpan(*bounds) if bounds else None,
    )


def manifest_of(record: RefRecord, blobs: Sequence[Blob], raw: bytes = b"") -> Manifest:
    """The manifest again, given the blobs of its entries in order, and what the origin said. RecordError."""
    entries = tuple(
        Entry(entry.path, blob, entry.span) for entry, blob in zip(record.entries, blobs, strict=True)
    )
    for entry in entries:
        if entry.span is not None and entry.span.stop > entry.blob.size:
            raise RecordError(f"{record.ref} names bytes past the end of blob {entry.blob.id}")
    return Manifest(record.ref, record.revision, record.tree, entries, raw)


def _digest(text: object, length: int) -> bytes | None:
    if text is None:
        return None
    digest = bytes.fromhex(_typed(text, str))
    if len(digest) != length:
        raise ValueError(f"a digest of {length} bytes expected")
    return digest


def _dump(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _load(payload: bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the record of a {what} is not JSON") from error
    if not isinstance(fields, dict):
        raise RecordError(f"the record of a {what} is not an object")
    return fields


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:  # a bool is no int here
        raise TypeError(f"{kind.__name__} expected")
    return value

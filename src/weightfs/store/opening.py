"""How a cache directory is taken into use: directories, format, epoch, and a look at every data file.

Rules that hold here:

- Nothing is deleted but data files whose deletion had begun. A cache of a newer format is left as it was found; a
  damaged index is set aside, and its copy takes its place (`backup`).
- After an unclean stop the epoch is raised and every present chunk is suspect. After a clean one, the chunks of a
  data file that was touched since are.
- Chunks that a data file is too short for, or whose file is gone, are absent before anybody can ask.
- The start reads bitmaps and looks at files (stat); it never scans chunk records, and never reads data.
"""

from __future__ import annotations

import json
import logging
import os
import pwd
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheCorruptError, CacheError, CacheFormatError
from weightfs.store import backup, evicting, ledger
from weightfs.store.disk import disk_errors
from weightfs.store.index import Index, Txn
from weightfs.store.ledger import Bits
from weightfs.store.records import BlobRecord, FileMark, RecordError, decode_file, encode_file
from weightfs.store.sparse import SparseFiles

log = logging.getLogger(__name__)

FORMAT = 2


def _to_2(txn: Txn) -> None:
    """What format 1 wrote is read as it is; a ref that it pinned has no `raw`, until it is asked for again.

    It did not note which blobs were whole once, so that all count as such: see `evicting`.

    The number was raised because a weightfs of format 1 would not see git's digests and call such blobs unverifiable,
    would leave the manifest of an older revision in the table `raw`, and would take a file inside a tar for damage.
    """
    _whole_all(txn)


def _whole_all(txn: Txn) -> None:
    """Whichever was whole once may be mapped: count all as such, with no word on when they were used."""
    for key in txn.keys("blob"):
        evicting.put_use(txn, ledger.blob_id(key), evicting.Use(whole=True))


# From the format that is the key to the next one. Each is run in the transaction that opens the cache.
MIGRATIONS: Mapping[int, Callable[[Txn], None]] = {1: _to_2}
_MAX_EPOCH = (
    0xFFFF  # u16 in the chunk records; then it begins again, and the bitmaps alone say what is suspect
)
_OWN_NAMES = frozenset({"lock", "index", "blobs", "control.sock", "lost+found", backup.COPIES, backup.ASIDE})


@dataclass(frozen=True, slots=True)
class State:
    """The cache as a whole. `instance` is a random name given when the cache was made."""

    epoch: int
    clean: bool
    instance: str


def make_directories(root: Path, *, create: bool) -> None:
    """Make, or check, the cache directory and the two below it. CacheError."""
    if not root.exists():
        if not create:
            raise CacheError(f"there is no cache at {root}: `weightfs pull` or `weightfs mount` makes one")
        with disk_errors(f"make the directory {root}"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with disk_errors(f"look at {root}"):
        found = root.stat()
        _check_owner(root, found)
        if found.st_mode & 0o077:
            if not {path.name for path in root.iterdir()} - _OWN_NAMES:
                root.chmod(0o700)
            elif found.st_mode & 0o022:
                raise CacheError(
                    f"others may write in {root}, which holds more than the cache: chmod go-w it"
                )
    for name in ("index", "blobs"):
        path = root / name
        with disk_errors(f"make the directory {path}"):
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
            _check_owner(path, found)
            if stat.S_IMODE(found.st_mode) != 0o700:
                path.chmod(0o700)


@dataclass(frozen=True, slots=True)
class Opened:
    """An index in use, and how it was found. `copied` names the copy that has all of it, if the last close made one."""

    index: Index
    state: State
    was_clean: bool
    copied: str | None


def open_index(root: Path, files: SparseFiles) -> Opened:
    """The index, taken into use: of a damaged or missing one its copy, or an empty one if there is none.

    CacheError, and its kinds.
    """
    if backup.is_missing(root) and backup.restore(root):
        log.error(
            "the index of the cache %s is missing: its copy takes its place, every chunk is hashed before it is used, "
            "and what landed after the copy was made is fetched again", root,
        )  # fmt: skip
    try:
        return _begin(root, files)
    except CacheCorruptError as error:
        wrong = error
    index = root / "index"
    for restore in (backup.restore, lambda _: False):
        aside = backup.set_aside(root)
        restored = restore(root)
        if restored:
            log.error(
                "the index %s is damaged (%s): it is %s now, its copy takes its place, every chunk is hashed before it "
                "is used, and what landed after the copy was made is fetched again", index, wrong.what, aside,
            )  # fmt: skip
        else:
            log.error(
                "the index %s is damaged (%s): it is %s now, and weightfs starts with an empty index, since there is "
                "no good copy: add the refs again that the configuration does not name; no data file is deleted",
                index, wrong.what, aside,
            )  # fmt: skip
        try:
            return _begin(root, files)
        except CacheCorruptError as error:
            if not restored:
                raise
            wrong = error
    raise wrong


def _begin(root: Path, files: SparseFiles) -> Opened:
    index = Index.open(root / "index")
    try:
        restored = backup.is_restored(root)

        def job(txn: Txn) -> tuple[State, bool, str | None]:
            if restored:
                _whole_all(txn)
            return (*begin(txn, files, root), backup.take_note(txn))

        state, was_clean, copied = index.write(job)
        backup.settled(root)
    except BaseException:
        index.abandon()
        raise
    return Opened(index, state, was_clean, copied)


def begin(txn: Txn, files: SparseFiles, root: Path) -> tuple[State, bool]:
    """Take the index into use: returns its state from now on, and whether the last stop was clean."""
    before = _format_and_state(txn, root)
    was_clean = before is None or before.clean
    if before is None:
        state = State(epoch=1, clean=False, instance=secrets.token_hex(16))
    else:
        epoch = before.epoch if was_clean else before.epoch % _MAX_EPOCH + 1
        state = State(epoch, clean=False, instance=before.instance)
    put_state(txn, state)
    for record in ledger.blob_records(txn):
        _look_at(txn, files, record, was_clean=was_clean)
    return state, was_clean


def end(txn: Txn, files: SparseFiles, state: State, copied: str | None) -> None:
    """Write the clean flag, the name of the copy, and how every data file looks that was read and written."""
    for key in txn.keys("blob"):
        found = files.status(ledger.blob_id(key))
        if found is not None and files.identity(ledger.blob_id(key)) in (None, (found.st_dev, found.st_ino)):
            txn.put_sealed("file", key, encode_file(_mark_of(found)))
    if copied is not None:
        backup.put_note(txn, copied)
    put_state(txn, State(state.epoch, clean=True, instance=state.instance))


def put_state(txn: Txn, state: State) -> None:
    """Write it."""
    fields = {"epoch": state.epoch, "clean": state.clean, "instance": state.instance}
    txn.put_sealed("meta", b"state", json.dumps(fields).encode())


def _format_and_state(txn: Txn, root: Path) -> State | None:
    """The state as the last process left it, migrated; None for a new index. CacheFormatError, RecordError."""
    value = txn.get("meta", b"format")
    if value is None:
        if any(txn.keys(table) for table in ("meta", "ref", "blob", "bits")):
            raise RecordError("its format is not recorded")
        txn.put("meta", b"format", b"%d" % FORMAT)
        return None
    if not value.isdigit() or len(value) > 9:
        raise RecordError("its format is not a number")
    found = int(value)
    if found > FORMAT:
        raise CacheFormatError(
            f"the cache {root} has format {found}, made by a newer weightfs, and this one knows formats up to "
            f"{FORMAT}: upgrade weightfs, or choose another cache directory"
        )
    for version in range(found, FORMAT):
        if version not in MIGRATIONS:
            raise CacheFormatError(
                f"the cache {root} has format {found}, which this weightfs cannot read any more"
            )
        MIGRATIONS[version](txn)
        log.info("the cache %s was migrated from format %d to %d", root, version, version + 1)
    if found < FORMAT:
        txn.put("meta", b"format", b"%d" % FORMAT)
    return _decode_state(txn.get_sealed("meta", b"state"))


def _decode_state(payload: bytes | None) -> State:
    try:
        fields = json.loads(payload or b"")
        epoch, clean, instance = fields["epoch"], fields["clean"], fields["instance"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError("its state is malformed") from error
    if (
        type(epoch) is not int
        or not 1 <= epoch <= _MAX_EPOCH
        or type(clean) is not bool
        or type(instance) is not str
    ):
        raise RecordError("its state is malformed")
    return State(epoch, clean, instance)


def _look_at(txn: Txn, files: SparseFiles, record: BlobRecord, *, was_clean: bool) -> None:
    blob, shape = record.blob.id, record.blob.shape
    bits = ledger.load_bits(txn, blob, shape)
    mark = _recorded_mark(txn, blob)
    txn.delete("file", blob.raw)
    if not len(bits.present):
        return
    found = files.status(blob)
    length = found.st_size if found is not None and stat.S_ISREG(found.st_mode) else 0
    whole = shape.chunk_count if length >= shape.size else length // shape.chunk_length
    lost = ledger.drop(txn, record, bits, list(_present_from(bits, whole)))
    if len(lost):
        log.warning(
            "the cache file %s has %d of %d bytes: %d chunks are fetched again when they are wanted",
            files.path(blob), length, shape.size, len(lost),
        )  # fmt: skip
    if not was_clean or mark is None or found is None or _mark_of(found) != mark:
        bits.suspect = bits.present.copy()
    if found is not None and len(bits.present):
        files.remember(blob, found)  # one that is put in its place before the first read is not read
    ledger.put_bits(txn, blob, bits)


def _present_from(bits: Bits, start: int) -> list[int]:
    runs = bits.present.runs(ChunkSpan(start, bits.present.count))
    return [chunk for run in runs for chunk in run]


def _recorded_mark(txn: Txn, blob: BlobId) -> FileMark | None:
    try:
        payload = txn.get_sealed("file", blob.raw)
        return None if payload is None else decode_file(payload)
    except RecordError:
        return None


def _mark_of(found: os.stat_result) -> FileMark:
    return FileMark(found.st_size, found.st_ino, found.st_ctime_ns, found.st_mtime_ns)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{path} is not a directory: remove it, or choose another cache directory")
    if found.st_uid != os.geteuid():
        raise CacheError(
            f"{path} belongs to {user_name(found.st_uid)}, not to {user_name(os.geteuid())}: run weightfs as its "
            "owner, or choose another cache directory"
        )


def user_name(uid: int) -> str:
    """Of a user; the number, if there is none of that number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"

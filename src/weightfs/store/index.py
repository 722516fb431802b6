"""The LMDB index of a cache: `<cache>/index/data.mdb`. The only module that writes with lmdb.

Tables, keys and values (`records.py` has the encodings; "sealed" is explained there)::

    meta   "format"           ASCII decimal; readable by every version of weightfs, past and future
           "state"            sealed JSON: epoch, clean, instance
           "paused"           empty; there while nothing is to be fetched in the background
           "copied"           the name of the copy that has all of this; there from a clean close to the next start
    ref    sha256(ref)        sealed JSON: ref, revision, tree, entries, added_at, previous revisions, pinned,
                              paused, fill
    raw    sha256(ref)        sealed: what the ref's origin said, byte for byte (at most `records.MAX_RAW`)
    blob   id[16]             sealed JSON: size, chunk_length, sha256 or git_sha1, mirrors, policy, trust, list
    list   id[16]             sealed: 32 bytes per chunk of the published list
    chunk  id[16] ‖ u64be offset
                              u8 state (1 landed, 2 listed, 3 proven, 4 disk-bad, 5 suspect; | 0x80: bytes dropped,
                              digest kept) | u8 source | u16 epoch | u32 length | sha256[32] | u32 landed_at
    bits   id[16]             sealed: u32be count ‖ present bitmap ‖ suspect bitmap, both little-endian
    run    id[16]             sealed: u64be frontier ‖ 8 × u32be H
    use    id[16]             sealed: u8 was whole once ‖ u8 n ‖ n × u32be last use of a region, seconds since 1970
    file   id[16]             sealed: size, inode, ctime, mtime at the last clean close
    doomed id[16]             sealed, empty: a data file that is to be deleted

Rules that hold here:

- The chunk records are the truth; `bits` says the same, is written in the same transaction, and spares the scan.
- Every commit is synced (neither MDB_NOSYNC nor MDB_WRITEMAP).
- The map grows when it is full; a transaction that met the end is run again, so jobs given to `write` must be
  repeatable.
- An lmdb.Error leaves this module as a CacheError only: `lmdberrors` says as which.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb
import lmdb.verify

from weightfs.errors import CacheError, DiskFault
from weightfs.store import probe
from weightfs.store.disk import disk_errors, reserve
from weightfs.store.lmdberrors import DAMAGED, HEADROOM, MapIsFullError, corrupt, lmdb_errors
from weightfs.store.readers import locks_in_memory
from weightfs.store.records import RecordError, seal, unseal

log = logging.getLogger(__name__)

TABLES = ("meta", "ref", "raw", "blob", "list", "chunk", "bits", "run", "use", "file", "doomed")
_NEEDED = ("ref", "raw", "blob", "list")  # of sealed values; what the others say can be found out again
_MAP_SIZE = 1 << 28  # address space, not memory: 2 million chunk records before it must grow
_MAX_MAP_SIZE = 1 << 42
_READ_BYTES = 1 << 20
_CLOSED = "closed"  # beside data.mdb: its SHA-256 when we closed it

T = TypeVar("T")


class Txn:
    """One transaction. Values are copies; nothing outlives it but bytes."""

    def __init__(self, txn: lmdb.Transaction[bytes], tables: dict[str, lmdb._Database]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: str, key: bytes) -> bytes | None:
        """The raw value."""
        return self._txn.get(key, db=self._tables[table])

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Write a raw value."""
        self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Whether there was one."""
        return self._txn.delete(key, db=self._tables[table])

    def get_sealed(self, table: str, key: bytes) -> bytes | None:
        """The payload of a sealed value. RecordError."""
        value = self.get(table, key)
        return None if value is None else unseal(table, key, value)

    def put_sealed(self, table: str, key: bytes, payload: bytes) -> None:
        """Write a sealed value."""
        self.put(table, key, seal(table, key, payload))

    def scan(self, table: str, prefix: bytes = b"", start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys that begin with `prefix`, from `start` on, ascending, with raw values."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(start or prefix):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def keys(self, table: str) -> list[bytes]:
        """Every key."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return list(cursor.iternext(values=False))


class Index:
    """An open index. Transactions may be asked for from any thread; a write waits for the write before it."""

    def __init__(self, directory: Path, env: lmdb.Environment, tables: dict[str, lmdb._Database]) -> None:
        self.directory = directory
        self._env = env
        self._tables = tables
        self._writer = threading.Lock()
        self._gate = _Gate()
        self._closed = False
        self._writes = 0
        self._map_size: int = env.info()["map_size"]
        self._doubted = False  # a write failed, and the file was not renewed since
        self._lost = False  # it could not be opened again then: there is nothing to read
        self._reserve()

    @classmethod
    def open(cls, directory: Path, *, map_size: int = _MAP_SIZE) -> Index:
        """Open or make the index. CacheCorruptError, DiskFault, NoSpaceError, CacheError."""
        data = directory / "data.mdb"
        seal_file = directory / _CLOSED
        with disk_errors(f"look at {data}"):
            _check_ours(data)
            known = _digest(data)
            closed = seal_file.read_bytes() if seal_file.is_file() else b""
            if (directory / DAMAGED).is_file():
                raise corrupt(directory, (directory / DAMAGED).read_text(errors="replace")[:200])
        if known and closed != known and (wrong := probe.walk(directory)) is not None:
            raise corrupt(directory, wrong)
        with disk_errors(f"write to {directory}"):
            seal_file.unlink(missing_ok=True)
        with lmdb_errors(directory):
            env, tables = _open(directory, map_size)
        return cls(directory, env, tables)

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A snapshot. Keep it short: a map that must grow waits for it."""
        with self._gate.shared(), lmdb_errors(self.directory):
            self._check_readable()
            with self._env.begin() as txn:
                yield Txn(txn, self._tables)

    @property
    def writes(self) -> int:
        """How many writes have been begun: where it is as it was, so is the index."""
        return self._writes

    def write(self, job: Callable[[Txn], T]) -> T:
        """Run `job` in a write transaction and sync it; its exception aborts. It may be run more than once."""
        with self._writer:
            self._writes += 1
            while True:
                self._check_open()
                if self._doubted:
                    self._renew()
                try:
                    result = self._attempt(job)
                except MapIsFullError:
                    self._grow()
                except DiskFault:
                    self._doubted = True
                    raise
                else:
                    self._reserve()
                    return result

    def _attempt(self, job: Callable[[Txn], T]) -> T:
        with lmdb_errors(self.directory):
            txn = self._env.begin(write=True)
            try:
                result = job(Txn(txn, self._tables))
                txn.commit()
            except BaseException:
                # py-lmdb 3.0 aborts a write only at a moment in which no thread is inside any call on the
                # environment: with busy readers that took minutes. So they wait outside for it.
                with self._gate.exclusive():
                    txn.abort()
                    if self._has_panicked():
                        self._doubted = True
                        # At once: else readers would be told of a sick disk, where it may only be full.
                        with contextlib.suppress(CacheError):
                            self._reopen()
                raise
        return result

    def _has_panicked(self) -> bool:
        """Whether LMDB refuses every further call, since the page that names the newest state was not written."""
        try:
            self._env.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            pass
        return False

    def close(self) -> None:
        """Close it, and note what the file is, so that the next start need not walk it; not if a write failed last."""
        with self._writer, self._gate.exclusive():
            if self._closed:
                return
            self._closed = True
            self._env.close()
            if self._doubted:
                return
        data = self.directory / "data.mdb"
        with disk_errors(f"write to {self.directory}"):
            descriptor = os.open(
                self.directory / _CLOSED,
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            try:
                os.write(descriptor, _digest(data))
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        """Close it without that note: the next start walks it."""
        with self._writer, self._gate.exclusive():
            if not self._closed:
                self._closed = True
                self._env.close()

    def trial(self) -> None:
        """Write something, as it is, in a synced transaction. DiskFault, NoSpaceError, CacheError."""
        self.write(lambda txn: txn.put("meta", b"state", txn.get("meta", b"state") or b""))

    def _renew(self) -> None:
        """After a failed write: open the file anew, from what is on the disk. Every transaction that was told is there.

        Pages of the failed one that stay in memory, as if they had been written, could be lost without an error when
        they are written again (`Cache.renew` has the reason); and LMDB itself refuses every further call once the page
        that names the newest state could not be written (MDB_PANIC). The whole file is read once before it is mapped:
        an error is one of `read(2)` then, and not a SIGBUS; until that succeeds, nothing can be read of it.
        """
        with self._gate.exclusive():
            self._reopen()

    def _reopen(self) -> None:
        data = self.directory / "data.mdb"
        with lmdb_errors(self.directory), disk_errors(f"read {data} again"):
            descriptor = os.open(data, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fdatasync(descriptor)  # while it goes on failing, what is there can be read
                self._env.close()
                self._lost = True
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                while os.read(descriptor, _READ_BYTES):
                    pass
            finally:
                os.close(descriptor)
            self._env, self._tables = _open(self.directory, self._map_size)
            self._lost = False
        self._doubted = False

    def copy_to(self, descriptor: int) -> None:
        """Write a copy of the index as it is now, without free pages, to an open file.

        CacheCorruptError if a value that cannot be done without is damaged, also if that was found earlier. CacheError.
        """
        with self._gate.shared(), lmdb_errors(self.directory):
            self._check_readable()
            if (self.directory / DAMAGED).exists():
                raise RecordError("damage was found while it was in use")
            with self._env.begin() as txn:
                for table in _NEEDED:
                    for key, value in txn.cursor(db=self._tables[table]):
                        unseal(table, key, value)
            self._env.copyfd(descriptor, compact=True)

    def verify(self) -> list[str]:
        """What a walk over every byte of the file finds wrong. Writers wait meanwhile."""
        walk: Callable[[str], list[str]] = lmdb.verify.verify  # has no annotations of its own
        with self._writer, lmdb_errors(self.directory):
            self._check_readable()
            try:
                findings = walk(os.fspath(self.directory))
            except lmdb.verify.VerifyError as error:
                findings = [str(error)]
        return [f"the index {self.directory} is damaged: {finding}" for finding in findings]

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError(f"the cache {self.directory.parent} was closed")

    def _check_readable(self) -> None:
        self._check_open()
        if self._lost:
            raise DiskFault(
                f"the index {self.directory} could not be read again after a write to it had failed: "
                "look at the disk (dmesg)"
            )

    def _grow(self) -> None:
        with self._gate.exclusive(), lmdb_errors(self.directory):
            size = self._env.info()["map_size"] * 2
            if size > _MAX_MAP_SIZE:
                raise CacheError(
                    f"the index {self.directory} outgrew {_MAX_MAP_SIZE} bytes: remove some refs"
                )
            self._env.set_mapsize(size)
            self._map_size = size

    def _reserve(self) -> None:
        """Keep room for the transactions that free room. Where the filesystem cannot, they may fail: no harm done."""
        try:
            descriptor = os.open(self.directory / "data.mdb", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            found = os.fstat(descriptor)
            if found.st_blocks * 512 < found.st_size + HEADROOM // 2:
                reserve(descriptor, found.st_size + HEADROOM)
        finally:
            os.close(descriptor)


def _open(directory: Path, map_size: int) -> tuple[lmdb.Environment, dict[str, lmdb._Database]]:
    """lmdb.Error."""
    with locks_in_memory(directory) as place:
        env = lmdb.open(
            os.fspath(place), map_size=map_size, max_dbs=32, mode=0o700, max_readers=512, readahead=False
        )
    try:
        env.reader_check()
        return env, {name: env.open_db(name.encode()) for name in TABLES}
    except BaseException:
        env.close()
        raise


class _Gate:
    """Many in `shared`, or one in `exclusive`: LMDB's map may change only while no transaction is open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def _check_ours(data: Path) -> None:
    """Refuse a data.mdb that is a link: LMDB would follow it. CacheError, CacheCorruptError."""
    for path in (data, data.with_name("lock.mdb")):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            raise CacheError(f"{path} is a link, which weightfs does not follow: remove it")
        if not stat.S_ISREG(found.st_mode):
            raise corrupt(data.parent, f"{path.name} is not a regular file")


def _digest(data: Path) -> bytes:
    """The SHA-256 of the file in hex; empty if there is no file, or an empty one."""
    try:
        with data.open("rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest().encode()
                if os.fstat(file.fileno()).st_size
                else b""
            )
    except FileNotFoundError:
        return b""

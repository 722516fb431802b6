"""Sparse data files: one per blob, at full length from the start, holes where nothing has landed.

Rules that hold here:

- A file is ours only if it is a regular file of our own user with exactly one name: symbolic and hard links are
  refused, so nobody can have us read from, or write into, a file of their choice.
- The file that was seen first in this session is the file until `forget`: a deleted, replaced or shortened one is a
  `DiskFault`, never a fresh file full of zeros under chunks that count as present.
- A short read is a `DiskFault`, never zeros.
- What `sync` returned for is on the disk under its name: the directory is synced with the first sync after a file was
  made. Not when it is made: a repository has hundreds of small files, and each such sync costs as much as a commit.
- A descriptor is closed when nobody uses it any more, so its number can never come to mean another blob amid a read.
- The lock guards dictionaries only; no system call that may wait for the disk is made under it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError, LostFileError
from weightfs.store.disk import disk_errors, punch_hole, sync_directory

_BLOCK = 4096  # page size: a hole smaller than a page is zeroed, not freed
MAX_DESCRIPTORS = 64
_POOLED_READ = 1 << 20  # the biggest FUSE request; a longer read gets a buffer of its own


@dataclass(slots=True)
class _Handle:
    """An open descriptor, how many calls use it now, and whether it is to be closed after the last of them."""

    descriptor: int
    users: int = 0
    retired: bool = False


class SparseFiles:
    """The data files of one cache directory. Every method may be called from several threads at once."""

    def __init__(self, directory: Path, *, max_descriptors: int | None = None) -> None:
        self.directory = directory
        self._limit = MAX_DESCRIPTORS if max_descriptors is None else max_descriptors
        self._lock = threading.Lock()
        self._open: OrderedDict[BlobId, _Handle] = OrderedDict()  # least recently used first
        self._seen: dict[BlobId, tuple[int, int]] = {}  # (device, inode) of the first sight in this session
        self._whole: set[BlobId] = set()  # prepared: the file is there, at full length
        self._nameless: dict[BlobId, object] = {}  # made, and the name is perhaps not on the disk yet
        self._tidy: set[BlobId] = set()  # what an earlier session left was thrown away once; never again
        self._read_only: set[BlobId] = set()  # opened for reading alone, since their filesystem was read-only
        self._buffers = threading.local()

    def path(self, blob: BlobId) -> Path:
        """Where the blob's file is, or will be."""
        return self.directory / str(blob)

    def prepare(self, blob: BlobId, size: int, *, keep: bool) -> Path:
        """Make sure of a file of `size` bytes.

        With `keep`, chunks are recorded: a missing, replaced or shortened file is a DiskFault. Without, whatever an
        earlier session left in the file counts for nothing and gives its space back.
        """
        path = self.path(blob)
        found = self.status(blob)
        if found is not None and not keep and blob not in self._tidy:
            # Another file, not the same one cut: through the kernel (passthrough) somebody may have it mapped still.
            os.close(self._open_file(blob))  # CacheError: it is none of ours to delete
            self.remove(blob)
            found = None
        if found is None:
            if keep or blob in self._whole:
                raise self._fault(blob, "is gone")
            self.forget(blob)
            descriptor = self._create(blob, size)
        else:
            descriptor = self._open_file(blob)
        try:
            with disk_errors(f"give {path} its length", blob):
                length = os.fstat(descriptor).st_size
                if length < size and (keep or blob in self._whole):
                    raise self._fault(blob, f"has {length} of {size} bytes")
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)
            self.remember(blob, os.fstat(descriptor))
            self._whole.add(blob)
            self._tidy.add(blob)
            self._open_for_writing(blob)
        finally:
            os.close(descriptor)
        return path

    def _open_for_writing(self, blob: BlobId) -> None:
        if blob in self._read_only:
            self._read_only.discard(blob)
            with self._lock:
                closing = self._retire(self._open.pop(blob, None))
            _close(closing)

    def identity(self, blob: BlobId) -> tuple[int, int] | None:
        """(device, inode) of the file that counts as the blob's in this session; None before it was prepared."""
        with self._lock:
            return self._seen.get(blob)

    def status(self, blob: BlobId) -> os.stat_result | None:
        """`lstat` of the blob's file; None if there is none."""
        try:
            with disk_errors(f"look at {self.path(blob)}", blob):
                return os.lstat(self.path(blob))
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def present(self) -> list[str]:
        """The names of everything in the directory, sorted."""
        with disk_errors(f"list {self.directory}"):
            return sorted(path.name for path in self.directory.iterdir())

    def read(self, blob: BlobId, span: ByteSpan) -> bytes:
        """Exactly the bytes of `span`. DiskFault on EIO, and where the file is missing or ends early."""
        if not len(span):
            return b""
        with self._borrow(blob) as descriptor, disk_errors(f"read {self.path(blob)}", blob):
            parts: list[bytes] = []
            at = span.start
            while at < span.stop:
                part = os.pread(descriptor, span.stop - at, at)
                if not part:
                    raise self._fault(blob, f"ends at byte {at} where bytes up to {span.stop} are recorded")
                parts.append(part)
                at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_nowait(self, blob: BlobId, span: ByteSpan) -> bytes | None:
        """The bytes of `span` if they are in the page cache and the file is open already; else None."""
        wanted = len(span)
        handle = self._take(blob)
        if handle is None:
            return None
        try:
            buffer = self._buffer(wanted)
            # RWF_NOWAIT: EAGAIN instead of waiting for the disk; a short count if only the first pages are there.
            if os.preadv(handle.descriptor, [buffer], span.start, os.RWF_NOWAIT) != wanted:
                return None
            return bytes(buffer)
        except OSError:
            return None  # `read` says what is wrong
        finally:
            self._give_back(handle)

    def sync(self, blob: BlobId) -> None:
        """Wait until every byte written to the file is on the disk. DiskFault, NoSpaceError.

        After a failure the kernel may have dropped the bytes and count them as written: a second, successful call
        proves nothing about them.
        """
        with self._borrow(blob) as descriptor:
            with disk_errors(f"write {self.path(blob)} to the disk", blob):
                os.fdatasync(descriptor)
                self._sync_names(blob)
            # Bytes in a file that has lost its name would be recorded, and be gone with the last descriptor.
            named = self.status(blob)
            mine = os.fstat(descriptor)
            if named is None or (named.st_dev, named.st_ino) != (mine.st_dev, mine.st_ino):
                raise self._fault(blob, "was removed or replaced")

    def _sync_names(self, blob: BlobId) -> None:
        with self._lock:
            made = self._nameless.copy()
        if blob in made:
            sync_directory(self.directory)
            with self._lock:
                for known, file in made.items():
                    if self._nameless.get(known) is file:
                        del self._nameless[known]

    def punch(self, blob: BlobId, spans: list[ByteSpan]) -> bool:
        """Give the space of `spans` back; False if the filesystem cannot. A missing file has nothing to give."""
        if self.status(blob) is None:
            return True
        with self._borrow(blob) as descriptor, disk_errors(f"free a part of {self.path(blob)}", blob):
            length = os.fstat(descriptor).st_size
            for span in spans:
                # Past the end too, so that the last, partial block is freed and not only zeroed.
                stop = -(-span.stop // _BLOCK) * _BLOCK if span.stop >= length else span.stop
                if stop > span.start and not punch_hole(descriptor, ByteSpan(span.start, stop)):
                    return False
        return True

    def forget_pages(self, blob: BlobId, span: ByteSpan) -> None:
        """Tell the kernel that it need not keep these pages in memory. Advice: nothing depends on it."""
        handle = self._take(blob)
        if handle is None:
            return
        try:
            os.posix_fadvise(handle.descriptor, span.start, len(span), os.POSIX_FADV_DONTNEED)
        except OSError:
            return
        finally:
            self._give_back(handle)

    def forget(self, blob: BlobId) -> None:
        """Nothing of this blob counts any more: the next `prepare` may make or mend the file."""
        with self._lock:
            self._seen.pop(blob, None)
            self._whole.discard(blob)
            handle = self._open.pop(blob, None)
            closing = self._retire(handle)
        _close(closing)

    def remove(self, blob: BlobId) -> int:
        """Delete the file; returns the bytes it occupied."""
        self.forget(blob)
        self._tidy.discard(blob)
        with self._lock:
            self._nameless.pop(blob, None)
        found = self.status(blob)
        if found is None:
            return 0
        with disk_errors(f"delete {self.path(blob)}", blob):
            self.path(blob).unlink(missing_ok=True)
        return found.st_blocks * 512 if found.st_nlink == 1 else 0

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            handles = list(self._open.values())
            self._open.clear()
            closing = [descriptor for handle in handles for descriptor in self._retire(handle)]
        _close(closing)

    # Opening

    def _create(self, blob: BlobId, size: int) -> int:
        path = self.path(blob)
        with disk_errors(f"create {path}", blob):
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            try:
                os.fchmod(descriptor, 0o600)
                os.ftruncate(descriptor, size)
                with self._lock:
                    self._nameless[blob] = object()  # this file, not another one that had the name before
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _open_file(self, blob: BlobId) -> int:
        path = self.path(blob)
        try:
            with disk_errors(f"open {path}", blob):
                # Non-blocking: a FIFO under this name must not hold us up; it means nothing for a regular file.
                flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                try:
                    descriptor = os.open(path, os.O_RDWR | flags)
                except OSError as error:
                    if error.errno != errno.EROFS:
                        raise
                    # What is in it can be read all the same. Whoever writes is told by the call that writes.
                    descriptor = os.open(path, os.O_RDONLY | flags)
                    self._read_only.add(blob)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._fault(blob, "is gone") from error
            raise
        try:
            self._check_ours(blob, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_ours(self, blob: BlobId, found: os.stat_result) -> None:
        path = self.path(blob)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError(f"{path} is not a regular file: remove it")
        if found.st_uid != os.geteuid():
            raise CacheError(
                f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: remove it, or give it back"
            )
        if found.st_nlink > 1:
            raise CacheError(
                f"{path} has {found.st_nlink} names (hard links), so others may write it: remove the others"
            )
        if self._seen.get(blob, (found.st_dev, found.st_ino)) != (found.st_dev, found.st_ino):
            raise self._fault(blob, "was replaced by another file")

    def remember(self, blob: BlobId, found: os.stat_result) -> None:
        """From now on, only this file is the blob's (unless another was seen before)."""
        with self._lock:
            self._seen.setdefault(blob, (found.st_dev, found.st_ino))

    def _fault(self, blob: BlobId, what: str) -> LostFileError:
        way_out = "what it held must be fetched again: run `weightfs verify --repair`"
        return LostFileError(f"the cache file {self.path(blob)} {what}; {way_out}", blob=str(blob))

    # Descriptors

    @contextmanager
    def _borrow(self, blob: BlobId) -> Iterator[int]:
        handle = self._take(blob) or self._add(blob)
        try:
            yield handle.descriptor
        finally:
            self._give_back(handle)

    def _take(self, blob: BlobId) -> _Handle | None:
        with self._lock:
            handle = self._open.get(blob)
            if handle is not None:
                handle.users += 1
                self._open.move_to_end(blob)
            return handle

    def _add(self, blob: BlobId) -> _Handle:
        fresh = _Handle(self._open_file(blob), users=1)
        self.remember(blob, os.fstat(fresh.descriptor))
        closing: list[int] = []
        with self._lock:
            handle = self._open.get(blob)
            if handle is None:
                handle = self._open[blob] = fresh
            else:  # another thread was quicker
                handle.users += 1
                closing.append(fresh.descriptor)
            while len(self._open) > self._limit:
                closing += self._retire(self._open.popitem(last=False)[1])
        _close(closing)
        return handle

    def _give_back(self, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1
            closing = [handle.descriptor] if handle.retired and not handle.users else []
        _close(closing)

    def _retire(self, handle: _Handle | None) -> list[int]:
        """Out of the table: returns the descriptor if it can be closed now. The lock is held."""
        if handle is None:
            return []
        handle.retired = True
        return [] if handle.users else [handle.descriptor]

    def _buffer(self, length: int) -> memoryview:
        if length > _POOLED_READ:
            return memoryview(bytearray(length))
        buffer: bytearray | None = getattr(self._buffers, "buffer", None)
        if buffer is None:
            buffer = self._buffers.buffer = bytearray(_POOLED_READ)
        return memoryview(buffer)[:length]


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

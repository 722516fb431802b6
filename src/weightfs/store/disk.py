"""What every file of the cache needs of the kernel: what its errors mean, room on the disk, names that last.

Rule: whoever meets an OSError, the same one means the same CacheError: one sentence with the way out.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError, DiskFault, NoDescriptorsError, NoSpaceError

_PUNCH_HOLE = 0x02  # FALLOC_FL_PUNCH_HOLE, linux/falloc.h
_KEEP_SIZE = 0x01  # FALLOC_FL_KEEP_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


@contextmanager
def disk_errors(what: str, blob: BlobId | None = None) -> Iterator[None]:
    """Turn an OSError into the CacheError it means; `what` completes "the cache cannot …"."""
    try:
        yield
    except OSError as error:
        raise translate(error, what, blob) from error


def translate(error: OSError, what: str, blob: BlobId | None = None) -> CacheError:
    """The CacheError for one OSError: NoSpaceError, DiskFault, NoDescriptorsError, or a plain CacheError."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpaceError(
                f"the cache cannot {what}: {reason}; free some space, or evict models from the cache"
            )
        case errno.EIO | errno.ENODATA | errno.EUCLEAN | errno.ENXIO | errno.ESTALE:
            text = f"the cache cannot {what}: {reason}; look at the disk (dmesg), and run `weightfs verify`"
            return DiskFault(text, blob="" if blob is None else str(blob))
        case errno.ELOOP:
            return CacheError(
                f"the cache cannot {what}: it is a symbolic link, which weightfs does not follow; remove it"
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            way_out = f"give user {os.geteuid()} write access, or choose another directory"
            kind = DiskFault if error.errno == errno.EROFS else CacheError
            return kind(f"the cache cannot {what}: {reason}; {way_out}")
        case errno.EMFILE | errno.ENFILE:
            return NoDescriptorsError(
                f"the cache cannot {what}: {reason}; raise the limit of open files (LimitNOFILE)"
            )
        case _:
            return CacheError(f"the cache cannot {what}: {reason}")


def reserve(descriptor: int, stop: int) -> bool:
    """Give a file disk blocks up to byte `stop` without changing its length; False where that cannot be had."""
    return bool(_libc.fallocate(descriptor, _KEEP_SIZE, 0, stop) == 0)


def punch_hole(descriptor: int, span: ByteSpan) -> bool:
    """Give the space of whole blocks of a file back; False if its filesystem cannot. OSError."""
    if not _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, span.start, len(span)):
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

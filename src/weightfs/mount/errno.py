"""The only errno tables: which number is seen for each reason that bytes, or what a name is, could not be had.

Never EINTR (callers retry it for ever), never ENOENT for anything transient, never EAGAIN (a blocking reader
spins).
"""

from __future__ import annotations

import errno

from weightfs.errors import FailureKind, NoSpaceError, ReadError, SourceError

# What the origin holds now is another version than the one that was opened: the handle is stale, the disk is
# well.
_TABLE: dict[FailureKind, int] = dict.fromkeys(FailureKind, errno.EIO) | {FailureKind.CHANGED: errno.ESTALE}

# Of a name that is looked up at its origin. ENOENT is the origin's own word alone: whoever sees it may create, cache or
# give up.
_NAMES: dict[FailureKind, int] = dict.fromkeys(FailureKind, errno.EIO) | {
    FailureKind.NOT_FOUND: errno.ENOENT,
    FailureKind.AUTH: errno.EACCES,
    FailureKind.TIMEOUT: errno.ETIMEDOUT,
    FailureKind.STALL: errno.ETIMEDOUT,
    FailureKind.NO_SPACE: errno.ENOSPC,
}


def errno_of(error: BaseException) -> int:
    """The errno for a failed read: ESTALE for a changed origin, EIO for every other reason, known or not."""
    return _TABLE[error.kind] if isinstance(error, ReadError) else errno.EIO


def errno_of_name(error: BaseException) -> int:
    """The errno for a lookup whose origin was asked: ENOENT only if it said that there is no such thing."""
    match error:
        case SourceError(kind=FailureKind.NOT_FOUND, status=401 | 403):
            return errno.EACCES  # the Hub's answer to who may not know whether there is such a repository
        case SourceError():
            return _NAMES[error.kind]
        case TimeoutError():
            return errno.ETIMEDOUT
        case NoSpaceError():
            return errno.ENOSPC
        case _:
            return errno.EIO

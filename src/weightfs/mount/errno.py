"""The only errno table: which number a reader sees for each reason that its bytes could not be had.

Never EINTR (callers retry it for ever), never ENOENT for anything transient, never EAGAIN (a blocking reader
spins).
"""

from __future__ import annotations

import errno

from weightfs.errors import FailureKind, ReadError

# What the origin holds now is another version than the one that was opened: the handle is stale, the disk is
# well.
_TABLE: dict[FailureKind, int] = dict.fromkeys(FailureKind, errno.EIO) | {FailureKind.CHANGED: errno.ESTALE}


def errno_of(error: BaseException) -> int:
    """The errno for a failed read: ESTALE for a changed origin, EIO for every other reason, known or not."""
    return _TABLE[error.kind] if isinstance(error, ReadError) else errno.EIO

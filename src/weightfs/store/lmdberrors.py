"""What LMDB's errors mean: a full map, a damaged index, a full or a failing disk.

Rule: damage that is met while the index is in use is written beside it, for the next start to find.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from weightfs.errors import CacheCorruptError, CacheError, DiskFault, NoSpaceError
from weightfs.store.disk import translate
from weightfs.store.records import RecordError

log = logging.getLogger(__name__)

DAMAGED = "damaged"  # beside data.mdb: what was found wrong while it was in use
# Kept allocated past the end of data.mdb: on a full disk, dropping chunks still needs new pages (copy on write).
HEADROOM = 8 << 20


class MapIsFullError(Exception):
    """Between `write` and its own retry."""


def corrupt(directory: Path, what: str) -> CacheCorruptError:
    """The error for an index that cannot be read, with the way out."""
    return CacheCorruptError(
        f"the index {directory} is damaged ({what}): the next start of weightfs sets it aside, and goes on from its "
        "copy, or from an empty index; no data file is deleted",
        what=what,
    )


def found_damaged(directory: Path, what: str) -> CacheCorruptError:
    """The same for an index in use; the next start is told."""
    try:
        (directory / DAMAGED).write_text(what)
    except OSError as error:
        log.warning("the next start is not told that the index %s is damaged: %s", directory, error)
    return corrupt(directory, what)


@contextmanager
def lmdb_errors(directory: Path) -> Iterator[None]:
    """Turn an lmdb.Error, or a record that cannot be, into the CacheError it means; or MapIsFullError."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise MapIsFullError from error
    except RecordError as error:
        raise found_damaged(directory, str(error)) from error
    except (
        lmdb.CorruptedError,
        # No transaction is used after its end, no table closed: these two come of damaged pages.
        lmdb.BadTxnError,
        lmdb.BadDbiError,
        lmdb.PageNotFoundError,
        lmdb.VersionMismatchError,
        lmdb.InvalidError,
    ) as error:
        raise found_damaged(directory, str(error)) from error
    except lmdb.PanicError as error:
        raise DiskFault(
            f"the index {directory} failed to reach the disk before: look at the disk (dmesg) ({error})"
        ) from error
    except lmdb.Error as error:
        raise _of_lmdb(error, directory) from error


def _of_lmdb(error: lmdb.Error, directory: Path) -> CacheError:
    number: int = getattr(error, "code", 0)  # LMDB's own codes are negative
    if number in (errno.ENOSPC, errno.EDQUOT) or (number == errno.EIO and _is_full(directory)):
        return NoSpaceError(
            f"the index {directory} cannot grow: the disk or the quota is full; free some space"
        )
    if number > 0:
        return translate(OSError(number, os.strerror(number)), f"use the index {directory}")
    return CacheError(f"the index {directory} failed: {error}")


def _is_full(directory: Path) -> bool:
    """LMDB calls a write that the disk cut short an I/O error."""
    try:
        space = os.statvfs(directory)
    except OSError:
        return False
    return space.f_bavail * space.f_frsize < HEADROOM

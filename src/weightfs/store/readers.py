"""LMDB's lock file, which has its table of readers, in memory instead of on the cache's disk.

LMDB writes to that file through a mapping, with every transaction. A page of it that is on no block yet, or on a
filesystem that never writes in place (btrfs), needs room on the disk then: where it is full, or a quota used up, that
is a SIGBUS, which no handler turns into an error (seen on Linux 6.18: ext4, btrfs, and a qgroup of btrfs). Nobody else
needs the file: one process has the cache (`lockfile`), and who looks at an index of others opens it without locks.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_MEMORY = "/dev/shm"  # noqa: S108  # a directory of ours is made there, under a name that nobody can guess
DATA, LOCK = "data.mdb", "lock.mdb"  # as LMDB calls them


@contextmanager
def locks_in_memory(directory: Path) -> Iterator[Path]:
    """A directory to open with LMDB in the place of `directory`; it is gone afterwards, and LMDB does without.

    It has links alone: to the data, and to memory. Where no such directory can be made, it is `directory`.
    """
    with ExitStack() as stack:
        try:
            memory = os.memfd_create("weightfs-index-lock", os.MFD_CLOEXEC)
            stack.callback(os.close, memory)
            # Not on a disk, if it can be helped: that one may be full, too.
            where = _MEMORY if os.access(_MEMORY, os.W_OK) else None
            place = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="weightfs-index-", dir=where))
            )
            (place / DATA).symlink_to(directory.absolute() / DATA)
            (place / LOCK).symlink_to(f"/proc/self/fd/{memory}")
        except OSError as error:
            log.warning(
                "the lock file of the index %s is not in memory (%s): should the disk be full, weightfs may end",
                directory, error.strerror,
            )  # fmt: skip
            place = directory
        yield place

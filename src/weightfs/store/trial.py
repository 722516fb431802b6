"""Whether the disk takes what is written to it: tried on a file of its own, which is gone afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from weightfs.errors import DiskFault
from weightfs.store.disk import disk_errors

TRIAL_BYTES = 64 << 10  # in several blocks, and soon done
_NAME = "trial"


def write_and_read(root: Path) -> None:
    """Write a little below `root`, sync it and read it back from the disk. CacheError says what went wrong."""
    path = root / _NAME
    with disk_errors(f"write {path}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            sent = os.urandom(TRIAL_BYTES)
            os.write(descriptor, sent)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            came = os.pread(descriptor, TRIAL_BYTES, 0)
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
    if came != sent:
        raise DiskFault(f"{path} did not keep what was written to it: look at the disk (dmesg)")

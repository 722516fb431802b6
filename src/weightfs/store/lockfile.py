"""One process owns a cache directory: an flock on `<cache>/lock`, which names its owner's process id.

Fetch workers inherit the descriptor (`Cache.lock_fd`): they die with their owner, a moment later, and until then may be
writing. So a lock whose owner has ended is waited for, for a bounded moment.

The file is never removed: unlinking a lock file lets two processes lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from weightfs.errors import CacheBusyError, CacheError
from weightfs.store.disk import disk_errors

DYING_SECONDS = 2.0  # for what an ended owner left behind; SIGKILL of a worker takes milliseconds
POLL_SECONDS = 0.02


def acquire(path: Path) -> int:
    """Lock `path`, write our process id into it, and return its descriptor. CacheBusyError, CacheError."""
    with disk_errors(f"open the lock file {path}"):
        # Close-on-exec: only processes that write data files are given it on purpose (`Cache.lock_fd`).
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
    try:
        _lock(descriptor, path)
        with disk_errors(f"write the lock file {path}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def release(descriptor: int) -> None:
    """Give the lock back; the file stays, empty."""
    try:
        os.ftruncate(descriptor, 0)
    except OSError:
        pass  # the text is a courtesy; the lock itself is what counts, and closing gives it back
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + DYING_SECONDS
    while not _try_lock(descriptor, path):
        pid = _owner(descriptor)
        if (pid is not None and _lives(pid)) or time.monotonic() >= deadline:
            who = "another weightfs process" if pid is None else f"the weightfs process {pid}"
            raise CacheBusyError(
                f"{path.parent} is in use by {who}: stop that one first, or choose another cache directory",
                pid=pid,
            )
        time.sleep(POLL_SECONDS)
    with disk_errors(f"look at the lock file {path}"):
        mine, named = os.fstat(descriptor), os.lstat(path)
    if (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino):
        raise CacheBusyError(f"{path} was replaced while it was being locked: try again")


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        with disk_errors(f"lock {path}"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except CacheError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        return False
    return True


def _lives(pid: int) -> bool:
    """Whether the process is there, and is more than an entry that its parent has not collected (proc(5), stat)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


def _owner(descriptor: int) -> int | None:
    try:
        text = os.pread(descriptor, 32, 0)
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None

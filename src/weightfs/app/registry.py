"""Which process serves which mount point, so that `weightfs umount` can wait until its cache is free again.

One small file per mount point in the user's runtime directory, written when the mount serves and removed at
the end. It is a hint: a file that a killed daemon left names a process that is gone, and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


def runtime_directory(env: Mapping[str, str]) -> Path:
    """RUNTIME_DIRECTORY as systemd gives it to a service that has one, else `$XDG_RUNTIME_DIR/weightfs`.

    Else `/run/weightfs` for root, and one in the temporary directory for others.
    """
    service = env.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # systemd.exec(5)
    if service.startswith("/"):
        return Path(service)
    given = env.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/"):
        return Path(given) / "weightfs"
    if os.geteuid() == 0:
        return Path("/run/weightfs")
    return Path(tempfile.gettempdir()) / f"weightfs-{os.geteuid()}"


def _file_of(directory: Path, mountpoint: Path) -> Path:
    return directory / f"{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]}.json"


def _is_ours(directory: Path) -> bool:
    """Whether nobody else could have put files there."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


@contextlib.contextmanager
def registered(mountpoint: Path, cache: Path, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """While the context is open, `daemon_of(mountpoint)` finds this process, if a directory for it can be had."""
    directory = runtime_directory(os.environ if env is None else env)
    file = _file_of(directory, mountpoint)
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(directory):
            text = json.dumps({"pid": os.getpid(), "mountpoint": str(mountpoint), "cache": str(cache)})
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_text(text)
            draft.replace(file)
    try:
        yield
    finally:
        if _recorded_pid(file, directory) == os.getpid():
            with contextlib.suppress(OSError):
                file.unlink()


def daemon_of(mountpoint: Path, env: Mapping[str, str] | None = None) -> int | None:
    """The process id that serves `mountpoint`, if it is recorded."""
    directory = runtime_directory(os.environ if env is None else env)
    return _recorded_pid(_file_of(directory, mountpoint), directory)


def _recorded_pid(file: Path, directory: Path) -> int | None:
    if not _is_ours(directory):
        return None
    try:
        record = json.loads(file.read_text())
        pid = record["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) and pid > 1 else None


@contextlib.contextmanager
def watching(pid: int | None) -> Iterator[int | None]:
    """A pidfd of the process, opened before it is asked to end, so that no other can take its number; None: gone."""
    if pid is None:
        yield None
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def wait_for_end(pidfd: int, seconds: float) -> bool:
    """Whether the process behind `pidfd` ended within `seconds`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))

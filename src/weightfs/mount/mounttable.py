"""What is mounted where, whether it lives, and how to take it away.

Nothing here touches a FUSE mount in this process without a time limit: a stale mount answers ENOTCONN, but a
stopped daemon's answers nothing, and not even SIGKILL ends the wait. So probes run in a subprocess that can
be left behind, and what is mounted is read from /proc/self/mountinfo, never found by stat.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from weightfs.errors import MountError
from weightfs.interpreter import not_started

SUBTYPE = "weightfs"
FSTYPE = f"fuse.{SUBTYPE}"
PROBE_TIMEOUT = 5.0
HELPER_TIMEOUT = 10.0  # fusermount3, umount2
_MAX_STACKED = 64
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CAP_SYS_ADMIN = 21

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo. `device` is `major:minor`; minor is the FUSE connection's number."""

    mount_id: int
    device: str
    path: str
    fstype: str
    source: str


class Health(enum.Enum):
    """What a probe of a mount found."""

    ALIVE = "alive"
    STALE = "stale"  # ENOTCONN: its daemon is gone
    SILENT = "silent"  # no answer in time: a stopped or stuck daemon


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse proc(5) mountinfo, in the order of mounting: of several at one path the last is on top."""
    mounts: list[Mount] = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if separator and len(fields) >= 6 and len(rest) >= 2:
            mounts.append(Mount(int(fields[0]), fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return mounts


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounts_at(path: Path) -> list[Mount]:
    """What is mounted at exactly this (canonical) path; the last one is on top."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return [mount for mount in parse_mountinfo(text) if mount.path == str(path)]


def canonical(mountpoint: Path) -> Path:
    """The absolute path without symbolic links, found without touching what is mounted there."""
    absolute = Path(os.path.abspath(mountpoint))  # noqa: PTH100 - Path.absolute() leaves `..` in place
    direct = Path(os.path.realpath(absolute.parent)) / absolute.name
    return direct if mounts_at(direct) else Path(os.path.realpath(direct))


def bounded(work: Callable[[], T], seconds: float, what: str) -> T:
    """Run `work` in a thread for at most `seconds`; MountError if it takes longer (the thread stays)."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="weightfs-mount")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise MountError(
            f"{what} did not answer within {seconds:g} s; a daemon below it may be stopped or stuck."
        )
    if errors:
        raise errors[0]
    return results[0]


_PROBE = """
import errno, os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(3 if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) else 0)
"""


def probe(path: Path, timeout: float = PROBE_TIMEOUT) -> Health:
    """Ask the mount at `path` for its statvfs, in a subprocess (`stat` may be answered from a cache).

    MountError if that process cannot be started.
    """
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-I", "-S", "-c", _PROBE, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise MountError(f"whether {path} answers cannot be found out: {not_started(error)}.") from None
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        # It may sit in an unkillable wait: it is reaped whenever that ends, and nobody waits for it here.
        threading.Thread(target=process.wait, daemon=True, name="weightfs-probe").start()
        return Health.SILENT
    return Health.STALE if code == 3 else Health.ALIVE


def has_mount_privilege() -> bool:
    """Whether mount(2) is ours to call: CAP_SYS_ADMIN is effective (root, or a service that was given it)."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAP_SYS_ADMIN & 1)


def detach_stale(path: Path) -> int:
    """Take away dead weightfs mounts at `path`, however many are stacked; return how many.

    Raises:
        MountError: a live one is there, one whose daemon does not answer, or one that cannot be taken away.
    """
    detached = 0
    while stack := mounts_at(path):
        top = stack[-1]
        if not top.fstype.startswith("fuse"):
            break
        match probe(path):
            case Health.ALIVE if top.fstype == FSTYPE:
                raise MountError(
                    f"{path} is already a live weightfs mount; unmount it first (weightfs umount {path})."
                )
            case Health.ALIVE:
                break
            case Health.SILENT:
                raise MountError(
                    f"{path} is mounted ({top.fstype}) but its daemon does not answer; end that daemon, "
                    f"or take the mount away with: weightfs umount --lazy {path}"
                )
            case Health.STALE:
                _log.warning("Detaching a stale %s mount at %s", top.fstype, path)
                try:
                    take_away(path, lazy=True)
                except OSError as error:
                    raise MountError(
                        f"The stale mount at {path} could not be detached ({error.strerror}); try: umount -l {path}"
                    ) from None
                if mounts_at(path)[-1:] == [top]:
                    raise MountError(
                        f"The stale mount at {path} could not be detached; try: umount -l {path}"
                    )
                detached += 1
        if detached > _MAX_STACKED:
            raise MountError(
                f"Over {_MAX_STACKED} stale mounts are stacked at {path}; something keeps mounting there."
            )
    return detached


def take_away(path: Path, *, lazy: bool) -> None:
    """Unmount what is on top at `path`. OSError (EBUSY, EPERM, EINVAL) as the kernel or fusermount3 say."""
    if has_mount_privilege():
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if _libc.umount2(os.fsencode(path), flags) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        return
    helper = fusermount()
    arguments = [helper, "-u", *(["-z"] if lazy else []), "--", str(path)]
    try:
        done = subprocess.run(  # noqa: S603 - found in PATH by its fixed name
            arguments, capture_output=True, text=True, errors="replace", timeout=HELPER_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise MountError(
            f"{helper} did not end within {HELPER_TIMEOUT:g} s while unmounting {path}."
        ) from None
    if done.returncode != 0:
        busy = "busy" in done.stderr.lower()
        raise OSError(
            errno.EBUSY if busy else errno.EPERM, done.stderr.strip() or "fusermount3 failed", str(path)
        )


def fusermount() -> str:
    """The path of fusermount3. MountError if it is not installed."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise MountError("An ordinary user needs fusermount3 to mount; install the package fuse3.")
    return helper


def unmount(mountpoint: Path, *, lazy: bool = False, timeout: float = HELPER_TIMEOUT) -> None:
    """Unmount a weightfs mount for a person; the daemon behind it then ends by itself.

    Args:
        mountpoint: where it is mounted.
        lazy: detach it now even if programs use it; they keep what they opened until the daemon ends.
        timeout: seconds.

    Raises:
        MountError: nothing of ours is mounted there, it is busy, we may not, or the time is over.
    """
    path = bounded(lambda: canonical(mountpoint), timeout, f"The directory above {mountpoint}")
    stack = mounts_at(path)
    if not stack or stack[-1].fstype != FSTYPE:
        raise MountError(f"{path} is not a weightfs mount; `findmnt -t {FSTYPE}` lists those there are.")
    try:
        bounded(lambda: take_away(path, lazy=lazy), timeout, f"Unmounting {path}")
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountError(
                f"{path} is busy: end the programs that use it (fuser -vm {path} lists them), or use --lazy."
            ) from None
        raise MountError(
            f"{path} cannot be unmounted ({error.strerror}); ask the user who mounted it, or root."
        ) from None
    deadline = time.monotonic() + timeout
    while stack[-1] in mounts_at(path):
        if time.monotonic() > deadline:
            raise MountError(f"{path} is still mounted after {timeout:g} s; try --lazy.")
        time.sleep(0.01)

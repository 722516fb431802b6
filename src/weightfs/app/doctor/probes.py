"""What this machine is like: thin, bounded, without a trace. Everything here blocks, and is called in threads."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import socket
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import weightfs
from weightfs.app.doctor import machine, storage
from weightfs.app.doctor.verdicts import Verdict, ok, problem, warning
from weightfs.config import Config
from weightfs.engine.room import default_min_free
from weightfs.errors import CacheError, MountError
from weightfs.mount import mounttable
from weightfs.store import peek
from weightfs.store.opening import user_name
from weightfs.units import counted

FUSE_CONF: Final = Path("/etc/fuse.conf")
PARAMETERS: Final = Path("/sys/module/fuse/parameters")
SYSCTL: Final = Path("/proc/sys/fs/fuse")
MOUNT_SECONDS: Final = 3.0  # a live mount answers in microseconds, one under load in milliseconds
CONNECT_SECONDS: Final = 3.0
INDEX_SECONDS: Final = 6.0
MAX_MOUNTS: Final = 24
MOUNTS_AT_ONCE: Final = 8  # each probe starts an interpreter
MAX_DATA_FILES: Final = 100_000  # counted within a second


def look_at_machine(config: Config, env: Mapping[str, str]) -> list[Verdict]:
    """Kernel, FUSE and limits."""
    privileged = mounttable.has_mount_privilege()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdicts = [
        machine.kernel(os.uname().release),
        machine.device(_open_device()),
        machine.helper(_find_helper(), privileged=privileged, no_new_privileges=_no_new_privileges()),
        machine.allow_other(_text(FUSE_CONF), configured=config.allow_other, privileged=privileged),
        machine.descriptors(soft, hard),
        machine.background(_number(PARAMETERS / "max_user_bgreq"), privileged=privileged),
        machine.request_timeout(
            _number(SYSCTL / "default_request_timeout"),
            _number(SYSCTL / "max_request_timeout"),
            config.read_timeout,
        ),
    ]
    if env.get("NOTIFY_SOCKET"):
        verdicts.append(machine.service(env.get("WATCHDOG_USEC", ""), env.get("CACHE_DIRECTORY", "")))
    return verdicts


def look_at_clock(skews: dict[str, float]) -> Verdict:
    """`skews` as of `machine.clock`."""
    installed = Path(weightfs.__file__).stat().st_mtime
    return machine.clock(time.time(), installed, skews)


def look_at_cache(config: Config) -> list[Verdict]:
    """The directory, its filesystem and its space."""
    root = config.cache
    try:
        found = _directory(root)
        place = root if found is not None else next(one for one in root.parents if one.exists())
        can_make = os.access(place, os.W_OK | os.X_OK)
        verdicts = [storage.directory(str(root), found, os.geteuid(), can_make=can_make)]
        place = Path(os.path.realpath(place))
        verdicts.append(storage.filesystem(str(place), _filesystem_of(place)))
        values = os.statvfs(place)
    except OSError as error:
        return [problem("cache directory", f"{root} cannot be looked at: {error.strerror}; name another")]
    total, free = values.f_blocks * values.f_frsize, values.f_bavail * values.f_frsize
    keep = default_min_free(total) if config.min_free is None else config.min_free
    space = storage.Space(total, free, _used(root / "blobs"))
    return [*verdicts, storage.space(space, config.max_size, keep)]


def look_at_index(root: Path) -> tuple[list[Verdict], list[str]]:
    """Of a cache that no daemon answers for: whether its index can be read, and its refs."""
    name = "cache"
    try:
        if not (root / "index").exists():
            return [ok(name, "it holds nothing yet")], []
        owner = _owner(root / "lock")
        if owner is not None:
            text = (
                f"it is in use by process {owner or 'unknown'}, which answers nobody: wait for it, or end it"
            )
            return [warning(name, text)], []
        refs = peek.ref_names(root / "index", INDEX_SECONDS)
    except OSError as error:
        return [problem(name, f"it cannot be looked into: {error.strerror}; run as its owner")], []
    except CacheError as error:
        return [problem(name, str(error))], []
    return [ok(name, f"nobody has it open; its index can be read, and has {counted(len(refs), 'ref')}")], refs


def look_at_mounts() -> list[Verdict]:
    """Every mount of ours that can be seen, the last at each path."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    found = {
        mount.path: mount for mount in mounttable.parse_mountinfo(text) if mount.fstype == mounttable.FSTYPE
    }
    chosen = list(found.values())[:MAX_MOUNTS]
    try:
        with ThreadPoolExecutor(max_workers=MOUNTS_AT_ONCE) as pool:
            healths = list(pool.map(lambda one: mounttable.probe(Path(one.path), MOUNT_SECONDS), chosen))
    except MountError as error:  # the others would end alike
        return [problem("mounts", str(error))]
    seen = [
        storage.Seen(one.path, health, _number(Path("/sys/class/bdi") / one.device / "read_ahead_kb"))
        for one, health in zip(chosen, healths, strict=True)
    ]
    return storage.mounts(seen, left=len(found) - len(chosen))


def connect(host: str, port: int) -> str | None:
    """Why no TCP connection can be had; None if one can."""
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS):
            return None
    except TimeoutError:
        return f"no answer within {CONNECT_SECONDS:g} s"
    except OSError as error:
        return error.strerror or type(error).__name__


def _open_device() -> int | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno
    return None


def _find_helper() -> machine.Helper | None:
    path = shutil.which("fusermount3")
    if path is None:
        return None
    found = Path(path).stat()
    return machine.Helper(path, setuid=bool(found.st_mode & stat.S_ISUID) and found.st_uid == 0)


def _no_new_privileges() -> bool:
    return re.search(r"^NoNewPrivs:\s*1$", _text(Path("/proc/self/status")) or "", re.MULTILINE) is not None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _directory(root: Path) -> storage.Directory | None:
    try:
        found = root.stat()
    except FileNotFoundError:
        return None
    return storage.Directory(
        found.st_mode, found.st_uid, os.access(root, os.W_OK | os.X_OK), user_name(found.st_uid)
    )


def _filesystem_of(place: Path) -> str:
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return storage.filesystem_of(str(place), mounttable.parse_mountinfo(text))


def _used(directory: Path) -> int:
    """Bytes that the data files take on the disk; what cannot be seen does not count."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for count, entry in enumerate(entries):
                if count >= MAX_DATA_FILES:
                    break
                total += entry.stat(follow_symlinks=False).st_blocks * 512  # stat(2): units of 512 bytes
    except OSError:
        pass
    return total


def _owner(path: Path) -> int | None:
    """Who has the lock of a cache: a process id, 0 if it is not told, None if nobody has it. OSError.

    The lock is tried shared, and given back in the same moment: who wants it meanwhile tries again by itself.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None

"""Verdicts on the cache and the mounts: pure functions of what `probes` found."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightfs.app.doctor.verdicts import Verdict, ok, problem, warning
from weightfs.mount.mounttable import Health, Mount
from weightfs.units import format_size

# Other machines may change the files behind our back, flock and mmap hold on one machine at best.
NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"}
)
MEMORY: Final = frozenset({"tmpfs", "ramfs"})
STACKED: Final = frozenset({"overlay", "aufs", "ecryptfs"})
WANTED_READ_AHEAD: Final = 4096  # KiB; what mount.session sets where it may


@dataclass(frozen=True, slots=True)
class Directory:
    """The cache directory as lstat(2) and access(2) show it. `owner` is the name of its user, or the number."""

    mode: int
    uid: int
    writable: bool
    owner: str


@dataclass(frozen=True, slots=True)
class Space:
    """The cache's filesystem, in bytes; `used` is what the data files take."""

    total: int
    free: int
    used: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A mount of ours, what a probe of it found, and its read-ahead in KiB if that can be read."""

    path: str
    health: Health
    read_ahead: int | None


def filesystem_of(path: str, mounts: Sequence[Mount]) -> str:
    """The type of the filesystem that `path` (absolute, without links) is on; empty if none is known."""
    holding = [mount for mount in mounts if Path(path).is_relative_to(mount.path)]
    # Of those at one path the last is on top.
    best = max(enumerate(holding), key=lambda pair: (len(pair[1].path), pair[0]), default=None)
    return "" if best is None else best[1].fstype


def filesystem(path: str, fstype: str) -> Verdict:
    """Whether a cache does well there."""
    name = "cache filesystem"
    where = f"{path} is on {fstype or 'a filesystem that is not known'}"
    way = "name a directory of a local disk with --cache"
    if fstype in NETWORK or fstype.startswith(("fuse.sshfs", "fuse.gluster", "fuse.ceph")):
        return problem(
            name, f"{where}, a network filesystem: locks and memory maps are not safe there; {way}"
        )
    if fstype.startswith("fuse"):
        return warning(
            name, f"{where}: whether locks, sparse files and memory maps hold is up to it; better {way}"
        )
    if fstype in MEMORY:
        return warning(name, f"{where}: it takes memory, and is gone after a restart; {way}")
    if fstype in STACKED:
        return warning(
            name,
            f"{where}: it goes with the container, and reads cannot be passed through to it; mount a volume there",
        )
    return ok(name, where)


def directory(path: str, found: Directory | None, uid: int, *, can_make: bool = True) -> Verdict:
    """`found`: None if there is nothing yet, and `can_make` whether it can be made."""
    name = "cache directory"
    if found is None and not can_make:
        return problem(name, f"{path} is not there, and this user cannot make it: name another with --cache")
    if found is None:
        return ok(name, f"{path} is not there yet: the first mount or pull makes it")
    text = ""
    if not stat.S_ISDIR(found.mode):
        text = f"{path} is not a directory: remove it, or name another with --cache"
    elif found.uid != uid and not uid:
        text = (
            f"{path} belongs to {found.owner}: root's commands reach a mount that has it; where none has, and for the "
            "rest of this report, run weightfs as that user (runuser -u)"
        )
        return warning(name, text)
    elif found.uid != uid:
        text = f"{path} belongs to {found.owner}: run as that user, or name another with --cache"
    elif not found.writable:
        text = f"{path} cannot be written: remount its filesystem writable, or name another with --cache"
    elif found.mode & 0o022:
        text = f"others may write in {path}: `chmod 700 {path}`"
    if text:
        return problem(name, text)
    if found.mode & 0o055:
        return warning(name, f"others may look into {path}: `chmod 700 {path}`")
    return ok(name, f"{path} is ours alone")


def space(found: Space, max_size: int | None, min_free: int) -> Verdict:
    """`min_free`: what is to stay free, the default resolved."""
    name = "disk space"
    free = format_size(found.free)
    if found.free < min(min_free, found.total) or not found.free:
        level = problem if not found.free else warning
        return level(
            name,
            f"{free} are free, and min-free keeps {format_size(min_free)}: nothing new is fetched without evicting; "
            "free some, run `weightfs gc`, or move the cache",
        )
    if max_size is not None and found.used > max_size:
        return warning(
            name,
            f"the cache holds {format_size(found.used)}, more than max-size ({format_size(max_size)}): "
            "`weightfs gc` evicts, pinned models stay",
        )
    room = found.free + found.used - min_free
    if max_size is not None and max_size > room:
        return warning(
            name,
            f"max-size is {format_size(max_size)}, but there is room for {format_size(room)}: min-free decides first",
        )
    return ok(name, f"{free} are free, {format_size(found.used)} are cached")


def mounts(seen: Sequence[Seen], *, left: int = 0) -> list[Verdict]:
    """Each mount of weightfs on this machine; `left` more were not looked at."""
    name = "mounts"
    if not seen:
        return [ok(name, "none of weightfs")]
    more = [warning(name, f"{left} more were not looked at: `findmnt -t fuse.weightfs` lists them")]
    return [_mount(name, one) for one in seen] + (more if left else [])


def _mount(name: str, one: Seen) -> Verdict:
    match one.health:
        case Health.STALE:
            return problem(
                name,
                f"{one.path} is stale, its daemon is gone: `weightfs umount --lazy {one.path}`, or mount there again",
            )
        case Health.SILENT:
            return problem(
                name,
                f"{one.path} does not answer: look at its daemon (stopped? stuck?), end it, and then "
                f"`weightfs umount --lazy {one.path}`",
            )
        case Health.ALIVE if one.read_ahead is not None and one.read_ahead < WANTED_READ_AHEAD:
            return warning(
                name,
                f"{one.path} reads {one.read_ahead} KiB ahead, which makes memory maps slow: only root can raise it "
                f"to {WANTED_READ_AHEAD}, in /sys/class/bdi/*/read_ahead_kb (docs/systemd.md)",
            )
        case Health.ALIVE:
            return ok(name, f"{one.path} answers")

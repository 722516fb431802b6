"""A mount that outlives its daemon: what is kept for the next one, and how that one begins.

Rules. A `Keeper` outside this process (systemd's FD store, or the parent of `--supervise`) holds two descriptors from
the moment that there is a mount: /dev/fuse, so that the connection does not end with us, and a memfd with the `Ledger`.
The next daemon takes both, skips the kernel's half of the handshake, and asks for everything again that was read and
not answered (FUSE_NOTIFY_RESEND, Linux 6.9). It does so only if all is as it was: any doubt is `Unfit`, and then the
old mount is detached and a new one made, as without a keeper; one line of the log says why.

`VERSION` is that of the ledger *and* of what the kernel remembers of us: inode numbers (see `inodes`), handles that
are inode numbers, offsets in directories. Whoever changes one of them adds 1.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from weightfs.errors import MountError
from weightfs.mount import ledger as ledgers
from weightfs.mount import mounttable
from weightfs.mount.ledger import Ledger
from weightfs.mount.session import Connection, MountOptions, connect

VERSION: Final = 1
MAX_ATTEMPTS: Final = 5  # daemons that die of what they take over; the next one begins anew

_log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who holds the descriptors. Nothing here fails: what cannot be kept is not kept."""

    leaving: bool  # this daemon is to go, and to leave the mount to the next one

    @property
    def available(self) -> bool:
        """Whether there is somebody to keep anything."""
        ...

    def inherited(self) -> tuple[int, int] | None:
        """The descriptors of /dev/fuse and of the ledger that an earlier daemon left, once; they are the caller's."""
        ...

    def keep(self, fuse: int, ledger: int) -> bool:
        """Hold copies of both from now on, whatever becomes of this process. False: that was not possible."""
        ...

    def drop(self) -> None:
        """Close the copies."""
        ...


class Unfit(Exception):  # noqa: N818 - not an error: a reason to do without
    """What was left cannot be taken over; says why."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A mount to be served. `resumed`: an earlier daemon's. `kept`: it outlives this one."""

    connection: Connection
    ledger: Ledger
    resumed: bool
    kept: bool


def obtain(mountpoint: Path, options: MountOptions, keeper: Keeper | None) -> Hold:
    """Take over the mount that was left, or make a new one. Blocking, bounded; MountError."""
    inherited = None if keeper is None else keeper.inherited()
    if keeper is not None and inherited is not None:
        fuse, memory = inherited
        try:
            return _resume(mountpoint, options, fuse, memory)
        except (Unfit, OSError) as reason:
            _log.warning(
                "The mount that an earlier daemon left is detached, and made anew: %s; what was open there is cut off",
                reason,
            )
            keeper.drop()
            _clear_away(memory)
            os.close(fuse)
        finally:
            os.close(memory)
    connection = connect(mountpoint, options)
    if keeper is None or not keeper.available:
        return Hold(connection, Ledger(), resumed=False, kept=False)
    try:
        return _begin(connection, options, keeper)
    except BaseException:
        _abandon(connection, keeper)
        raise


def _begin(connection: Connection, options: MountOptions, keeper: Keeper) -> Hold:
    if not connection.resend:
        _log.info(
            "A restart cuts off what is open: the kernel cannot repeat requests (FUSE_NOTIFY_RESEND, Linux 6.9)"
        )
        return Hold(connection, Ledger(), resumed=False, kept=False)
    memory = os.memfd_create("weightfs-ledger", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, ledgers.SIZE)
        ledger = _mapped(memory)
        ledger.describe({"version": VERSION, **_facts(connection), **_terms(options)})
        kept = keeper.keep(connection.fd, memory)
    finally:
        os.close(memory)
    if kept:
        _log.info("What is open outlives a restart of weightfs")
    return Hold(connection, ledger, resumed=False, kept=kept)


def _abandon(connection: Connection, keeper: Keeper) -> None:
    keeper.drop()
    os.close(connection.fd)
    with suppress(OSError, MountError):
        mounttable.take_away(connection.path, lazy=True)


def _facts(connection: Connection) -> dict[str, object]:
    facts = asdict(connection) | {"path": str(connection.path)}
    del facts["fd"]
    return facts


def _terms(options: MountOptions) -> dict[str, object]:
    """What a mount is made with, and cannot be changed afterwards."""
    return {"allow_other": options.allow_other, "uid": os.geteuid()}


def _mapped(memory: int) -> Ledger:
    return Ledger(memoryview(mmap.mmap(memory, ledgers.SIZE)))


def _resume(mountpoint: Path, options: MountOptions, fuse: int, memory: int) -> Hold:
    """Raises Unfit, and then has changed nothing."""
    status = os.fstat(memory)
    if not stat.S_ISREG(status.st_mode) or status.st_size != ledgers.SIZE:
        raise Unfit("its ledger is of another version")
    ledger = _mapped(memory)
    connection = _described(ledger, fuse)
    ledger.attempts += 1
    if ledger.attempts > MAX_ATTEMPTS:
        raise Unfit(f"{MAX_ATTEMPTS} daemons in a row took it over and ended before they served")
    if not ledger.whole:
        raise Unfit(f"more than {ledgers.SLOTS} files were open at once, and not all of them are known")
    if not stat.S_ISCHR(os.fstat(fuse).st_mode):
        raise Unfit("the descriptor is not /dev/fuse")
    state = select.poll()
    state.register(fuse, select.POLLIN)
    if any(events & select.POLLERR for _, events in state.poll(0)):
        raise Unfit("it was unmounted, or its connection was ended")
    facts = ledger.facts()
    for what, now in _terms(options).items():
        if facts.get(what) != now:
            raise Unfit(f"its {what} was {facts.get(what)}, and is to be {now}".replace("_", "-").lower())
    if connection.path != mounttable.canonical(mountpoint):
        raise Unfit(f"it is at {connection.path}, not at {mountpoint}")
    if not any(mount.device == connection.device for mount in mounttable.mounts_at(connection.path)):
        raise Unfit("it is detached")
    return Hold(connection, ledger, resumed=True, kept=True)


def _described(ledger: Ledger, fuse: int) -> Connection:
    """The connection that the ledger tells of. Unfit."""
    try:
        facts = ledger.facts()
        if facts["version"] != VERSION:
            raise Unfit(f"it is of version {facts['version']!r}, not {VERSION}")
        names = ("device", "kernel_minor", "flags", "passthrough", "resend")
        return Connection(fd=fuse, path=Path(facts["path"]), **{name: facts[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise Unfit(f"its ledger cannot be read ({type(error).__name__})") from None


def _clear_away(memory: int) -> None:
    """Detach the mount that the ledger tells of, if it is still there: its keeper may close it a moment later."""
    with suppress(OSError, MountError, ValueError, KeyError, TypeError):
        facts = _mapped(memory).facts()
        path = Path(facts["path"])
        if [mount.device for mount in mounttable.mounts_at(path)][-1:] == [facts["device"]]:
            mounttable.take_away(path, lazy=True)

"""Descriptors that outlive this process: systemd's FD store (sd_notify(3), sd_listen_fds(3)).

`weightfs mount --supervise` speaks the same protocol, so that a daemon does not know who keeps its mount. Whether there
is a store at all is what the variable FDSTORE says: systemd sets it since version 254, our units and the
supervisor always do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import Final, Self

from weightfs.app import notify

FUSE: Final = "weightfs-fuse"
LEDGER: Final = "weightfs-ledger"
FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
MAX_FDS: Final = 64  # of what LISTEN_FDS may say

log = logging.getLogger(__name__)


def claim(env: MutableMapping[str, str]) -> dict[str, int]:
    """The descriptors that were handed to this process, by name; no child gets them, or hears of them."""
    try:
        mine = int(env.get("LISTEN_PID", "")) == os.getpid()
        count = min(int(env.get("LISTEN_FDS", "")), MAX_FDS)
    except ValueError:
        return {}
    names = env.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        env.pop(name, None)
    if not mine:
        return {}
    found: dict[str, int] = {}
    for index in range(count):
        try:
            os.set_inheritable(FIRST_FD + index, False)
        except OSError:
            continue
        if index < len(names):
            found[names[index]] = FIRST_FD + index
    return found


class FdStore:
    """`mount.takeover.Keeper` with a service manager. `leaving`: the next daemon gets the mount."""

    def __init__(self, inherited: tuple[int, int] | None, *, available: bool) -> None:
        self.leaving = False
        self._inherited = inherited
        self._available = available

    @classmethod
    def from_environment(cls, env: MutableMapping[str, str]) -> Self:
        """What this process was started with."""
        found = claim(env)
        fuse, ledger = found.get(FUSE, -1), found.get(LEDGER, -1)
        try:
            available = notify.has_manager(env) and int(env.get("FDSTORE", "0")) > 0
        except ValueError:
            available = False
        if notify.has_manager(env) and not available:
            log.info(
                "A restart cuts off what is open: the service has no FD store (FileDescriptorStoreMax=, FDSTORE)"
            )
        if fuse >= 0 and ledger >= 0:
            return cls((fuse, ledger), available=available)
        for fd in (fuse, ledger):  # one without the other is of no use
            if fd >= 0:
                os.close(fd)
        store = cls(None, available=available)
        if max(fuse, ledger) >= 0:
            store.drop()
        return store

    @property
    def available(self) -> bool:
        """Whether somebody keeps what `keep` gives him."""
        return self._available

    def leave(self) -> None:
        """This daemon is to go, and to leave the mount as it is."""
        self.leaving = True

    def inherited(self) -> tuple[int, int] | None:
        """/dev/fuse and the ledger, of an earlier daemon; once."""
        inherited, self._inherited = self._inherited, None
        return inherited

    def keep(self, fuse: int, ledger: int) -> bool:
        """Hand copies of both over. The ledger first: without it, /dev/fuse is of no use."""
        # FDPOLL=0: else each request that comes to /dev/fuse would wake the manager, too.
        return all(
            notify.notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fds=[fd])
            for name, fd in ((LEDGER, ledger), (FUSE, fuse))
        )

    def drop(self) -> None:
        """Have the copies closed."""
        if self._available:
            for name in (FUSE, LEDGER):
                notify.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

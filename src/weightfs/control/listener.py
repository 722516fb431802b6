"""The daemon's end of the control socket: mode 0600, and only root and the daemon's own user are let in.

The mode of a socket is checked by the kernel at connect; SO_PEERCRED is checked again after accept, for a
cache directory that somebody made readable. At most `MAX_CONNECTIONS` are open; one more is closed at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trio

from weightfs.control.address import usable_address
from weightfs.errors import DaemonError

MAX_CONNECTIONS: Final = 64
BACKLOG: Final = 64
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED

log = logging.getLogger(__name__)


def peer_uid(connection: trio.socket.SocketType | socket.socket) -> int:
    """The user id of whoever connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(data)[1]
    return uid


@contextlib.contextmanager
def listening(path: Path) -> Iterator[trio.socket.SocketType]:
    """A listening socket at `path`, replacing what a daemon that was killed left; removed at the end.

    The caller owns the cache's lock, so nobody else can be listening there. DaemonError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with usable_address(path) as address:
            path.unlink(missing_ok=True)
            sock.bind(address)
            # Before listen(): until then every connect is refused.
            path.chmod(0o600)
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise DaemonError(
            f"the control socket {path} cannot be made: {error.strerror}; no command reaches this process: remove "
            "what is there, or choose another cache directory"
        ) from None
    sock.setblocking(False)
    wrapped = trio.socket.from_stdlib_socket(sock)
    try:
        yield wrapped
    finally:
        wrapped.close()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts so many at a time; `open_streams` are those not yet closed."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._inner = trio.SocketListener(sock)
        self.open_streams: set[trio.SocketStream] = set()

    def lets_in(self, stream: trio.SocketStream) -> bool:
        """Whether this one may ask; if not, the log says why."""
        del stream
        if len(self.open_streams) < MAX_CONNECTIONS:
            return True
        log.warning("over %d connections to one socket of weightfs; one more was closed", MAX_CONNECTIONS)
        return False

    async def accept(self) -> trio.SocketStream:
        """The next connection that is let in."""
        while True:
            stream = await self._inner.accept()
            if self.lets_in(stream):
                self.open_streams.add(stream)
                return stream
            await trio.aclose_forcefully(stream)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._inner.aclose()

    def cut(self) -> None:
        """End every open connection: a peer that does not read cannot hold up our end."""
        for stream in self.open_streams:
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_RDWR)


class PeerCheckedListener(BoundedListener):
    """Accepts from root and from our own user."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__(sock)
        self._allowed = {0, os.geteuid()}

    def lets_in(self, stream: trio.SocketStream) -> bool:
        """Whether it is one of ours, and not one too many."""
        uid = peer_uid(stream.socket)
        if uid not in self._allowed:
            log.warning("a process of user %d tried the control socket and was refused", uid)
            return False
        return super().lets_in(stream)

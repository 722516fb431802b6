"""systemd's journal in its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/): one datagram an entry.

Our own, because it is one `sendto`: cysystemd and systemd-python come with libsystemd, whose call blocks the loop where
the journal does not read. Here a datagram that is not taken at once is an OSError. Rule: every value is one line and
bounded, so that neither the protocol's form for binary values nor a memfd for large entries is ever needed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TextIO

SOCKET: Final = Path("/run/systemd/journal/socket")
# One entry has a message (logs.MAX_LINE characters of 4 bytes at most) and some 15 fields; net.core.wmem_default, which
# bounds a datagram, is 208 KiB.
MAX_VALUE: Final = 1024  # characters of any value but the message


def is_journal(stream: TextIO, env: Mapping[str, str] | None = None) -> bool:
    """Whether JOURNAL_STREAM (systemd.exec(5)) is about this stream: it may be inherited from a terminal's session."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (os.environ if env is None else env).get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def encode(fields: Mapping[str, str | int]) -> bytes:
    """One entry; a line end inside a value becomes a blank."""
    lines = (f"{name}={value}".replace("\n", " ") for name, value in fields.items())
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


class Journal:
    """A socket to the journal, from its making to `close`."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def send(self, fields: Mapping[str, str | int]) -> None:
        """One entry, at once. OSError: nobody is there, or it has no room for it now."""
        self._socket.sendto(encode(fields), self._path)

    def close(self) -> None:
        """No more."""
        self._socket.close()

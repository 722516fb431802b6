"""Where the control socket is: `control.sock` in the cache directory, whatever the length of its path.

A Unix address holds 107 bytes of path (unix(7)); a longer one is reached through
`/proc/self/fd/N/control.sock`, with N an open descriptor of the directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SOCKET_NAME: Final = "control.sock"
MAX_DIRECT: Final = 100  # bytes


def socket_path(cache: Path) -> Path:
    """The control socket of a cache."""
    return cache / SOCKET_NAME


@contextlib.contextmanager
def usable_address(path: Path) -> Iterator[str]:
    """`path` as it fits into a socket address, while the context is open. OSError: no such directory."""
    if len(os.fsencode(path)) <= MAX_DIRECT:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)

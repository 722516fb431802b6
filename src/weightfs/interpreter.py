"""What is said when a process that runs our own Python does not start.

It happens where somebody took the interpreter away or its permissions, as an installation under way does, and where
processes, memory or descriptors are used up.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

_USED_UP: Final = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def not_started(error: OSError) -> str:
    """Why, and the way out, as the end of a sentence."""
    reason = os.strerror(error.errno or 0)
    if error.errno in _USED_UP:
        return f"no process can be started ({reason}): end some, or raise the limits of this user or service"
    return (
        f"{sys.executable} cannot be started ({reason}): make it executable for this user, or install weightfs again "
        "and restart it"
    )

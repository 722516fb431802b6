"""A process that holds tokens leaves no core dump, and is not looked into by others of its user.

Rule: called first thing in every process of ours. The limit is inherited by what we start; the flag is not: execve(2)
sets it again, so that each fetch worker does this once more.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from typing import Final

PR_SET_DUMPABLE: Final = 4  # <linux/prctl.h>


def forbid_core_dumps() -> None:
    """For this process, from here on.

    RLIMIT_CORE (setrlimit(2)) keeps files from being written. A program in /proc/sys/kernel/core_pattern is run
    whatever the limit is (core(5)). That is what PR_SET_DUMPABLE forbids, and ptrace(2) and /proc/PID/{mem,environ} for
    processes of the same user. Root, with CAP_SYS_PTRACE, may still attach a debugger. The hard limit is the user's.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)

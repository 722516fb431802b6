"""SIGUSR2 makes a daemon write the stacks of its threads to stderr, also when its loop stands still.

Rule: nothing of ours runs then. The interpreter's faulthandler writes from the signal handler itself, in C, and takes
neither the interpreter's lock nor memory: 100 threads of 100 frames at most, to the descriptor that is noted now.
Interrupted system calls are started again. It looks at threads that run, so it is for a daemon that hangs;
`weightfs debug stacks` is for all others, and has the tasks too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys


def tell_stacks_on_signal() -> None:
    """From now on; without a stderr of its own (in a test) the process has none of it."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True, chain=False)

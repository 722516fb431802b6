"""Keep the daemon's memory where it is needed, and its loop from standing still for the sake of memory.

glibc's allocator would hold on to every read's buffer.

A read of 1 MiB allocates 1 MiB. glibc serves the first from `mmap`, then raises its threshold and takes the next from
the heap, which fragments and is not given back: 438 MB with 64 readers, where 52 MB are in use (tests/bench, row
`memory`). A fixed threshold (mallopt(3), M_MMAP_THRESHOLD) keeps such buffers out of the heap.

Python's collector of cycles looks at every object now and then, and nothing else runs meanwhile: 1.4 s with a
repository of 100,000 files, several times while it is added (tests/bench/stalls.py). What such a look has left is in
use, nearly all of it for as long as its ref is; so it is not looked at again. Everything but cycles is freed as before.
What leaks is the cycles that were in use at the time of a long look, and there are few such looks: each takes some
hundred thousand objects more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from typing import Any, Final

M_MMAP_THRESHOLD: Final = -3
THRESHOLD: Final = (
    256 * 1024
)  # bytes: below every read that matters, above everything else that is allocated often


def give_back_buffers() -> None:
    """For this process, from here on. Nothing happens where the C library has no mallopt."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)


LONG_LOOK: Final = 0.02  # seconds of the processor's time: some 200,000 objects


def keep_looks_short() -> None:
    """For this process, from here on: objects that a long look of the collector has left are not looked at again.

    Nor are those that are there by now: modules, nearly all.
    """
    gc.collect()
    gc.freeze()
    began = 0.0

    def note(phase: str, info: dict[str, Any]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        elif info["generation"] == 2 and time.thread_time() - began > LONG_LOOK:
            gc.freeze()

    gc.callbacks.append(note)

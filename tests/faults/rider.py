"""A client of a mount whose daemon is restarted and killed under it: it compares every byte, and notes its waits.

    rider.py MODE PATH PLAIN PROGRESS

MODE: stream (pread, from end to end again and again), map (page faults here and there), open (open, read, stat, list,
close). PLAIN has the same bytes; how many operations were done stands in PROGRESS, always. It goes on until that file
is removed, and then prints JSON: each wait of more than a twentieth of a second, as [begin on CLOCK_MONOTONIC,
seconds]. Pages that the kernel has are thrown away again and again, so that there are requests. Any error, and any
wrong byte, ends it with a traceback.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator

STEP = 1 << 18
PAGE = 4096
LONG = 0.05


def stream(path: str, plain: int, size: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY)
    while True:
        for at in range(0, size, STEP):
            assert os.pread(fd, STEP, at) == os.pread(plain, STEP, at), at
            yield
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def faults(path: str, plain: int, size: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    while True:
        for _ in range(64):
            at = random.randrange(size // PAGE) * PAGE
            assert memory[at : at + PAGE] == os.pread(plain, PAGE, at), at
            yield
        memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def opens(path: str, plain: int, size: int) -> Iterator[None]:
    while True:
        fd = os.open(path, os.O_RDONLY)
        at = random.randrange(size // PAGE) * PAGE
        assert os.pread(fd, PAGE, at) == os.pread(plain, PAGE, at), at
        yield
        assert os.stat(path).st_size == size
        assert os.path.basename(path) in os.listdir(os.path.dirname(path))
        os.close(fd)
        yield


def main() -> None:
    mode, path, plain, place = sys.argv[1:5]
    steps = {"stream": stream, "map": faults, "open": opens}[mode]
    waits: list[tuple[float, float]] = []
    progress = os.open(place, os.O_WRONLY)
    began = time.monotonic()
    for count, _ in enumerate(steps(path, os.open(plain, os.O_RDONLY), os.path.getsize(plain)), 1):
        now = time.monotonic()
        if now - began > LONG:
            waits.append((began, now - began))
        os.pwrite(progress, b"%d" % count, 0)
        if not os.fstat(progress).st_nlink:
            break
        began = time.monotonic()
    print(json.dumps(waits))


if __name__ == "__main__":
    main()

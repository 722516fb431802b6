"""Readers for the bench, each in a process of its own, so that neither our interpreter nor the daemon's is in the way.

    python clients.py faults PATH COUNT THREADS SEED     4 KiB page faults scattered over a mapping
    python clients.py latency COLD CACHED SECONDS        stat of COLD, 1 MiB reads of CACHED: their 99th percentiles
    python clients.py readers PATH COUNT                 COUNT readers at different places, until stdin ends

Prints one line of JSON. Page faults and system calls are made through ctypes, which releases the GIL around them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import statistics
import sys
import threading
import time

MIB = 1024 * 1024
PAGE = 4096
STATX_BASIC_STATS = 0x7FF
AT_STATX_FORCE_SYNC = 0x2000  # ask the filesystem, not the kernel's cache of attributes
AT_FDCWD = -100
LIBC = ctypes.CDLL(None, use_errno=True)


def faults(path: str, count: int, threads: int, seed: int) -> dict[str, object]:
    """Touch `count` pages in random order from `threads` threads; seconds, and the offsets touched."""
    size = os.path.getsize(path)
    offsets = random.Random(seed).sample(range(0, size - PAGE, PAGE), count)
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    view = memoryview(mapping)
    # The address of a read-only buffer: numpy takes it without a copy.
    import numpy as np

    address = int(np.frombuffer(view, np.uint8).ctypes.data)

    def touch(mine: list[int]) -> None:
        page = ctypes.create_string_buffer(PAGE)
        for offset in mine:
            LIBC.memcpy(page, ctypes.c_void_p(address + offset), ctypes.c_size_t(PAGE))

    workers = [threading.Thread(target=touch, args=(offsets[k::threads],)) for k in range(threads)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"seconds": time.monotonic() - started, "offsets": offsets}


def latency(cold: str, cached: str, seconds: float) -> dict[str, object]:
    """99th percentiles in ms; each read's pages are dropped from this mount's page cache first."""
    buffer = ctypes.create_string_buffer(512)
    stats: list[float] = []
    reads: list[float] = []
    places = random.Random(1)
    file = os.open(cached, os.O_RDONLY)
    size = os.fstat(file).st_size
    block = bytearray(MIB)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        started = time.monotonic()
        failed = LIBC.statx(AT_FDCWD, cold.encode(), AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, buffer)
        stats.append(time.monotonic() - started)
        offset = places.randrange(size // MIB) * MIB
        os.posix_fadvise(file, offset, MIB, os.POSIX_FADV_DONTNEED)
        started = time.monotonic()
        got = os.preadv(file, [block], offset)
        reads.append(time.monotonic() - started)
        if failed or got != MIB:
            raise OSError(f"statx returned {failed}, preadv {got}")
        time.sleep(0.002)
    return {"stat_p99": p99(stats) * 1000, "read_p99": p99(reads) * 1000, "samples": len(stats)}


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def readers(path: str, count: int) -> dict[str, object]:
    """`count` sequential readers, evenly spread over the file, until stdin ends."""
    size = os.path.getsize(path)
    done = [0] * count

    def read(number: int) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(size // count * number)
            block = bytearray(MIB)
            while file.readinto(block):
                done[number] += MIB

    for number in range(count):
        threading.Thread(target=read, args=(number,), daemon=True).start()
    sys.stdin.read()
    return {"bytes": sum(done), "stuck": sum(not nbytes for nbytes in done)}


def main() -> None:
    match sys.argv[1:]:
        case ["faults", path, count, threads, seed]:
            found = faults(path, int(count), int(threads), int(seed))
        case ["latency", cold, cached, seconds]:
            found = latency(cold, cached, float(seconds))
        case ["readers", path, count]:
            found = readers(path, int(count))
        case _:
            sys.exit(__doc__)
    print(json.dumps(found), flush=True)
    os._exit(0)  # readers may be blocked in the kernel: do not wait for them


if __name__ == "__main__":
    main()
